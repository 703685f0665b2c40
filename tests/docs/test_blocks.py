"""Blocks of the documentation are true: commands exist with their flags, settings are settings, and Python runs."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from corolla.cli import app
from corolla.cli.settings import load_settings
from corolla.testing import LocalSwarm, save_tiny_model

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN = {  # their Python is run, and says so; that of other pages is read
    "use.md": ["Once upon a time", "session_closed never"],
    "tuning.md": ["4 steps"],
}
ADDRESS, MODEL = "tls://192.0.2.7:31330", "Qwen/Qwen3-8B"


def blocks(page, *languages):
    """Give the code blocks of a page in some languages; the language of most is not said."""
    text = page.read_text(encoding="utf-8")
    return [body for language, body in re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S) if language in languages]


def commands(page):
    """Give what is typed after ``corolla`` in the blocks of a page, without what a shell does with it."""
    for block in blocks(page, "", "sh", "console"):
        for line in block.splitlines():
            for typed in re.findall(r"(?:^|\| *)(?:[A-Z_]+=\S* )*corolla (.*)", line):
                words = shlex.split(typed, comments=True)
                ends = [at for at, word in enumerate(words) if word in ("|", ">", "&&", ";")]
                yield words[: min(ends, default=len(words))]


COMMANDS = sorted({tuple(command) for page in PAGES for command in commands(page)})


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_in_the_documentation_is_one(command):
    done = CliRunner().invoke(app, [*command, "--help"], prog_name="corolla")
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "toml")], ids=lambda page: page.name)
def test_every_setting_in_the_documentation_is_one(page, tmp_path):
    for block in blocks(page, "toml"):
        (tmp_path / "corolla.toml").write_text(block, encoding="utf-8")
        load_settings(file=tmp_path / "corolla.toml", environment={})


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_python_in_the_documentation_imports_what_there_is(page):
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "corolla":
                home = __import__(node.module, fromlist=[alias.name for alias in node.names])
                assert [alias.name for alias in node.names if not hasattr(home, alias.name)] == []


@pytest.mark.parametrize("page", RUN)
def test_the_guides_for_programs_run_as_they_are_written(page, tmp_path):
    model = str(save_tiny_model(tmp_path / "model"))
    program = "\n".join(blocks(ROOT / "docs" / page, "python"))
    assert ADDRESS in program
    assert MODEL in program
    with LocalSwarm(model, ["0:2", "2:4"], "--threads", "1", logs=tmp_path) as swarm:
        swarm.wait_until_online()
        (tmp_path / "program.py").write_text(program.replace(ADDRESS, swarm.address).replace(MODEL, model))
        done = subprocess.run(
            [sys.executable, "program.py"], capture_output=True, text=True, timeout=250, check=False, cwd=tmp_path
        )
    assert done.returncode == 0, done.stderr
    assert [words for words in RUN[page] if words not in done.stdout] == []


def test_the_menu_of_the_site_leads_to_pages_and_to_each_once():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    parts = [part for section in config["nav"] for part in section.values()]
    named = [name for part in parts for name in ([part] if isinstance(part, str) else [*map(first, part)])]
    assert len(named) == len(set(named))
    assert set(named) <= {page.name for page in PAGES[1:]}


def first(entry):
    (name,) = entry.values()
    return name


def test_the_rules_notice_what_is_not_so(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "```\nX=1 corolla serve m --nonsense  # so\necho hi | corolla chat --quiet > file\ncorollary\n```\n"
    )
    assert [*commands(page)] == [["serve", "m", "--nonsense"], ["chat", "--quiet"]]

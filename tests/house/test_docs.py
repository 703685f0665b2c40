"""What the pages name exists, their links lead somewhere, and the generated ones are fresh."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
DATED = ("CHANGELOG.md", "docs/adr/")  # they tell of what was so when they were written
FOLDERS = ("src/", "tests/", "docs/", "bench/", "examples/", ".ci/", ".github/")
FILES = (".md", ".toml", ".txt", ".yml", ".yaml", "Makefile")

by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


@by_page
def test_each_link_to_a_file_leads_to_one(page):
    targets = re.findall(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)", without_code(page))
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert not missing


@by_page
def test_each_path_and_name_in_the_text_exists(page, modules):
    if page.relative_to(ROOT).as_posix().startswith(DATED):
        pytest.skip("a page about the past")
    rooms = {path.partition("/")[0].removesuffix(".py") for path in modules}
    missing = [word for word in named(page) if not exists(word, rooms, modules)]
    assert not missing


def test_generated_pages_are_fresh():
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "generate.py", "--check"], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def without_code(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def named(page: Path) -> list[str]:
    """Give what stands alone between back-ticks; a ``::`` or a line number after a path is not part of it."""
    return [re.sub(r"(::.*|:\d+)$", "", word) for word in re.findall(r"`([^`\s]+)`", without_code(page))]


def exists(word: str, rooms: set[str], modules: dict[str, ast.Module]) -> bool:
    if any(mark in word for mark in "<>*{}$=@()"):
        return True  # a pattern, or code
    if word.startswith(FOLDERS) or (word.endswith(FILES) and "://" not in word):
        return (ROOT / word).exists()
    if word.startswith("corolla."):
        return defined(word.split(".")[1:], modules)
    if "/" in word and word.partition("/")[0] in rooms:
        path = word.rstrip("/")
        return path in modules or f"{path}.py" in modules or f"{path}/__init__.py" in modules
    return True


def defined(parts: list[str], modules: dict[str, ast.Module]) -> bool:
    """Say whether ``corolla.<parts>`` is a module, or a name that one exports or defines."""
    for end in range(len(parts), -1, -1):
        path = "/".join(parts[:end])
        tree = modules.get(f"{path}.py") or modules.get(f"{path}/__init__.py".lstrip("/"))
        if tree is not None:
            return end == len(parts) or parts[end] in identifiers(tree)
    return False


def identifiers(tree: ast.Module) -> set[object]:
    """Give every name in a module: defined, imported, assigned or listed as a text in ``__all__``."""
    return {getattr(node, field, None) for node in ast.walk(tree) for field in ("name", "id", "attr", "value")}


def test_the_rule_notices_what_does_not_exist(modules):
    rooms = {"wire", "errors", "telemetry"}
    good = ["docs/generate.py", "Makefile", "corolla.errors.PeerError", "corolla.telemetry", "telemetry/log", "model/x"]
    bad = ["docs/nothing.md", "corolla.errors.Nothing", "corolla.nothing", "telemetry/nothing", "tests/nothing/"]
    assert [word for word in good + bad if exists(word, rooms, modules)] == good

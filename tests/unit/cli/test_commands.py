import importlib
import json
import shlex
import subprocess
import sys
import tomllib
from itertools import takewhile

import pytest
import typer

from corolla.cli import app
from corolla.cli.settings import SECTIONS, field_of

COMMANDS = {command.name: command.help for command in app.registered_commands}
each_command = pytest.mark.parametrize("name", COMMANDS)


def found(name):
    home = {"config": "about", "version": "about"}.get(name, name)
    return typer.main.get_command(getattr(importlib.import_module(f"corolla.cli.{home}"), name))


def commands_of(name):
    """Give the command, or those below it, each with the words that name it."""
    rest = [((name,), found(name))]
    while rest:
        words, command = rest.pop()
        below = getattr(command, "commands", {})
        rest += [((*words, word), one) for word, one in below.items()]
        if not below:
            yield words, command


@each_command
def test_the_list_of_commands_says_what_each_says_of_itself(name):
    assert found(name).help.partition("\n")[0] == COMMANDS[name]


@each_command
def test_each_flag_is_a_setting_and_shows_its_help(name):
    for _, command in commands_of(name):
        flags = [flag for flag in command.params if flag.name not in {"config", "help"}]
        assert flags
        for flag in flags:
            section, _, field = flag.name.partition("_")
            assert section in SECTIONS
            assert flag.help == field_of(f"{section}.{field}").metadata["help"]


@each_command
def test_help_can_be_asked_for(name, invoke):
    for words, _ in commands_of(name):
        done = invoke(*words, "--help")
        assert (done.exit_code, done.stderr) == (0, "")
        assert "--debug" in done.stdout


@each_command
def test_help_gives_examples_that_the_command_takes(name):
    for words, command in commands_of(name):
        shown = command.help.partition("Examples:")[2].replace("\\[", "[")
        examples = [line.strip() for line in shown.splitlines() if line.strip()]
        assert examples, f"corolla {' '.join(words)} --help has no example"
        for example in examples:
            spoken = shlex.split(example.rpartition("| ")[2] if "| corolla" in example else example)
            spoken = list(takewhile(lambda word: word not in {"|", "<", ">"}, spoken))
            own = ["corolla", *(word for word in words if word != "run")]
            assert spoken[: len(own)] == own
            command.make_context(words[-1], spoken[len(own) :])  # raises if it does not know a flag


def test_help_and_version_load_no_torch():
    program = """
import sys
from corolla.cli import main
sys.argv = ["corolla", *sys.argv[1:]]
try:
    main()
finally:
    print({"torch", "transformers", "numpy", "corolla.swarm", "corolla.hub"} & set(sys.modules))
"""
    for arguments in (["--help"], ["version"], ["version", "--json"]):
        command = [sys.executable, "-c", program, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.endswith("set()\n")


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "corolla", "version", "--json"], capture_output=True, check=True)
    assert json.loads(done.stdout)["python"] == ".".join(map(str, sys.version_info[:3]))


def test_config_shows_values_and_where_they_come_from(invoke, tmp_path, monkeypatch):
    file = tmp_path / "my.toml"
    file.write_text("[server]\nport = 1234\n")
    monkeypatch.setenv("COROLLA_ENGINE_KV_BYTES", "1MiB")
    done = invoke("config", "--json", "--config", str(file))
    shown = {row["key"]: (row["value"], row["origin"]) for row in json.loads(done.stdout)}
    assert shown["server.port"] == ("1234", f"file {file}")
    assert shown["engine.kv_bytes"] == ("1048576", "environment COROLLA_ENGINE_KV_BYTES")
    assert shown["output.json"] == ("True", "flag --json")
    assert {key.partition(".")[0] for key in shown} == set(SECTIONS)
    assert "server.port" in invoke("config").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve"], "server.model has no default"),
        (["serve", "smollm2", "--port", "http"], "server.port is 'http' (flag --port)"),
        (["serve", "smollm2", "--blocks", "8:4"], "server.blocks is '8:4'"),
        (["serve", "smollm2", "--blocks", "0:4", "--num-blocks", "3"], "give one"),
        (["serve", "smollm2", "--peer", "nowhere"], "'nowhere' is no address"),
        (["chat", "smollm2"], "no peer of a swarm is given"),
        (["chat", "smollm2", "--peer", "nowhere"], "'nowhere' is no address"),
        (["generate", "smollm2", "--top-p", "2", "--prompt", "x"], "top_p is 2.0"),
        (["info"], "name a model"),
        (["demo", "--servers", "0"], "servers is 0"),
        (["config", "--config", "/nowhere/x.toml"], "cannot be read"),
    ],
)
def test_a_mistake_of_the_caller_is_one_line_and_exit_code_2(invoke, arguments, message):
    done = invoke(*arguments, stdin="a question")
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


@pytest.mark.parametrize("arguments", [["--nothing"], ["nothing"], ["version", "--nothing"], ["version", "x"]])
def test_what_is_no_command_line_is_exit_code_2(invoke, arguments):
    assert invoke(*arguments).exit_code == 2


@pytest.mark.parametrize("command", ["serve", "info"])
def test_other_failures_are_one_line_and_exit_code_1(invoke, command, tmp_path):
    done = invoke(
        command, str(tmp_path), *(["--host", "127.0.0.1", "--port", "0", "--quiet"][: 5 * (command == "serve")])
    )
    assert done.exit_code == 1
    assert done.stderr.startswith("error: ")
    assert "no weights" in done.stderr


def test_debug_shows_where_an_error_arose(invoke, tmp_path):
    assert "Traceback" not in invoke("info", str(tmp_path)).stderr
    assert "Traceback" in invoke("info", str(tmp_path), "--debug").stderr


def test_the_readme_names_commands_that_exist(invoke, request):
    text = (request.config.rootpath / "README.md").read_text()
    named = [line.split()[1] for line in text.splitlines() if line.startswith("corolla ")]
    assert named
    assert set(named) <= set(COMMANDS)


def test_the_entry_point_is_this_program(request):
    project = tomllib.loads((request.config.rootpath / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"corolla": "corolla.cli:main"}

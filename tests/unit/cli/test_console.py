import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from corolla.cli.config import OutputConfig
from corolla.cli.console import Output, without_controls
from corolla.cli.progress import show_progress


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("plain\ttext\n", "plain\ttext\n"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;a title\x07here", "here"),
        ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x1bPq#0\x1b\\sixel", "sixel"),
        ("\x9b2Jcleared", "cleared"),
        ("\x1bcreset", "reset"),
        ("back\x08\x08\rspace\x00\x7f", "backspace"),
        ("cut \x1b[3", "cut 3"),
        ("ünïcödé 日本 🙂", "ünïcödé 日本 🙂"),
    ],
)
def test_what_commands_a_terminal_is_taken_out(text, rest):
    assert without_controls(text) == rest


@given(st.text(st.characters(max_codepoint=0xFF)))
def test_no_control_character_is_left(text):
    assert all(char in "\t\n" or not (char < " " or "\x7f" <= char <= "\x9f") for char in without_controls(text))


def test_a_models_text_is_not_markup(capsys):
    Output(OutputConfig()).stream("[bold]a[/bold] :smile:\x1b[2J")
    assert capsys.readouterr().out == "[bold]a[/bold] :smile:"


@pytest.mark.parametrize("config", [OutputConfig(quiet=True), OutputConfig(json=True)])
def test_silent_output_has_no_notes_and_no_progress(config, capsys):
    output = Output(config)
    output.note("something happens")
    with show_progress(output) as report:
        report("loading", 1, 2, "files")
    output.json({"a": 1})
    assert capsys.readouterr() == ('{"a":1}\n', "")


def test_without_a_terminal_progress_is_a_line_when_it_begins_and_one_when_it_ends(capsys):
    with show_progress(Output(OutputConfig())) as report:
        for done in range(1001):
            report("downloading x", done * 1000, 1_000_000, "bytes")
        report("waiting", 0, None, "files")
        report("loading y", 3, 3, "tensors")
    assert capsys.readouterr().err.splitlines() == [
        "downloading x",
        "downloading x: 1.0 MB of 1.0 MB",
        "waiting",
        "loading y: 3 of 3 tensors",
    ]


def test_on_a_terminal_progress_is_a_bar_that_leaves_when_it_is_full():
    output = Output(OutputConfig())
    output.notes = Console(file=io.StringIO(), force_terminal=True, width=80)
    with show_progress(output) as report:
        report("loading blocks", 1, 4, "tensors")
        report("loading blocks", 4, 4, "tensors")
        report("hashing", 5_000_000, None, "bytes")
    drawn = output.notes.file.getvalue()
    assert "Hashing" in drawn
    assert "5.0 MB" in drawn
    assert "Loading blocks" not in drawn.rpartition("Hashing")[2]

"""Events are written as promised, whatever is in them."""

import json
import logging

import pytest

from corolla.telemetry import configure_logging, event, logger


def test_an_event_is_one_line_with_its_fields(capsys):
    configure_logging()
    event(logger("corolla.swarm.directory"), "announcement dropped", peer="abc", reason="bad signature", age_s=3)
    line = capsys.readouterr().err
    assert line.endswith(' info swarm.directory: announcement dropped peer=abc reason="bad signature" age_s=3\n')


@pytest.mark.parametrize("hostile", ["two\nlines", "\x1b[31mred", "\x9b31m", "\u2028", "", "a=b", 'say "hi"'])
@pytest.mark.parametrize("as_json", [False, True])
def test_a_text_from_a_peer_cannot_break_the_line(capsys, hostile, as_json):
    configure_logging(json=as_json)
    event(logger("corolla.server"), "joined", name=hostile)
    line = capsys.readouterr().err.removesuffix("\n")
    assert line.isprintable()
    written = json.loads(line)["fields"]["name"] if as_json else json.loads(line.partition("name=")[2])
    assert written == hostile


def test_json_keeps_fields_apart_from_what_every_event_has(capsys):
    configure_logging("debug", json=True)
    event(logger("corolla.engine"), "tick", level=logging.DEBUG, message="mine", time=1.5, peer=object)
    content = json.loads(capsys.readouterr().err)
    assert content["message"] == "tick"
    assert content["level"] == "debug"
    assert content["fields"] == {"message": "mine", "time": 1.5, "peer": "<class 'object'>"}


@pytest.mark.parametrize("as_json", [False, True])
def test_an_error_brings_its_traceback(capsys, as_json):
    configure_logging(json=as_json)
    event(logger("corolla.server"), "span failed", level=logging.ERROR, error=ValueError("no such block"))
    assert "ValueError: no such block" in capsys.readouterr().err


def test_events_below_the_level_are_neither_written_nor_formatted(capsys):
    class Untouchable:
        def __str__(self):
            raise AssertionError("formatted")

    configure_logging("warning")
    event(logger("corolla.engine"), "tick", value=Untouchable())
    assert capsys.readouterr().err == ""


def test_configuring_twice_writes_each_event_once(capsys):
    configure_logging()
    configure_logging()
    event(logger("corolla.engine"), "tick")
    assert capsys.readouterr().err.count("tick") == 1

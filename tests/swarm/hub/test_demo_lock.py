"""Several servers that start at once prepare the demo model once."""

import subprocess
import sys

import pytest

PREPARE = """
import sys
from pathlib import Path
from corolla.hub.demo import _lock

with _lock(Path(sys.argv[1]), lambda label, *_: print(label, flush=True)):
    print("preparing", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def start(tmp_path):
    started = []

    def start():
        command = [sys.executable, "-c", PREPARE, tmp_path / "lock"]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.stdin.close()
        process.wait()
        process.stdout.close()


def test_the_second_says_that_it_waits_and_goes_on_when_the_first_is_done(start):
    first = start()
    assert first.stdout.readline() == "preparing\n"
    second = start()
    assert second.stdout.readline() == "Waiting for another process that prepares smollm2\n"
    first.stdin.close()
    assert second.stdout.readline() == "preparing\n"


def test_one_that_was_killed_holds_nobody_up(start):
    first = start()
    assert first.stdout.readline() == "preparing\n"
    first.kill()
    first.wait()
    assert start().stdout.readline() == "preparing\n"

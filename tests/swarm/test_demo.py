"""The demo as a new user sees it, with a tiny model: in a pipe, at a terminal, and interrupted."""

import os
import subprocess
import sys
import threading

import psutil
import pytest

from corolla.testing import save_tiny_model

LIMIT_S = 120.0

# Runs a command at a terminal of its own, and copies between that and its own standard streams.
PROMPT = b"\x1b[?2004h"  # bracketed paste is switched on whenever a line can be typed
AT_TERMINAL = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"


@pytest.fixture
def model(tmp_path):
    return save_tiny_model(tmp_path / "tiny")


@pytest.fixture
def environment(tmp_path):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("COROLLA_")}  # noqa: TID251
    return kept | {
        "COROLLA_HUB_CACHE_DIR": str(tmp_path / "cache"),
        "COROLLA_CHAT_MAX_NEW_TOKENS": "12",
        "TMPDIR": str(tmp_path),
        "XDG_CONFIG_HOME": str(tmp_path / "account"),
        "COLUMNS": "120",
        "TERM": "xterm",
    }


def command(model, servers=2):
    return [sys.executable, "-m", "corolla", "demo", "--model", str(model), "--servers", str(servers)]


def processes_of(model):
    found = (process for process in psutil.process_iter(["cmdline"]))
    return [process for process in found if str(model) in (process.info["cmdline"] or [])]


def test_without_a_terminal_it_asks_one_question_and_ends(model, environment, tmp_path):
    done = subprocess.run(
        [*command(model), "--question", "Who are you?"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=environment,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    question, answer, chain, *_ = done.stdout.splitlines()
    assert question == "> Who are you?"
    assert answer
    assert "0:2 -> " in chain
    assert " 2:4]" in chain
    assert "tokens/s" in chain
    assert "2 servers are online" in done.stderr
    assert processes_of(model) == []
    assert not list(tmp_path.glob("corolla-demo-*"))


class Terminal:
    """A command at a terminal, watched while it writes."""

    def __init__(self, arguments, environment):
        self.process = subprocess.Popen(
            [sys.executable, "-c", AT_TERMINAL, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        self.text, self.seen = b"", 0
        self.changed = threading.Condition()
        self.reader = threading.Thread(target=self.read, daemon=True)  # noqa: TID251
        self.reader.start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()  # its terminal goes with it
        self.process.wait()
        self.reader.join()
        self.process.stdin.close()
        self.process.stdout.close()

    def read(self):
        while piece := os.read(self.process.stdout.fileno(), 4096):
            with self.changed:
                self.text += piece
                self.changed.notify_all()

    def wait_for(self, text):
        """Wait until this is written after what was waited for last."""
        with self.changed:
            assert self.changed.wait_for(lambda: text in self.text[self.seen :], LIMIT_S), self.text.decode()
            self.seen = self.text.index(text, self.seen) + len(text)

    def type(self, keys):
        self.process.stdin.write(keys)
        self.process.stdin.flush()


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_at_a_terminal_it_chats_on_until_it_is_left(model, environment):
    with Terminal(command(model, servers=1), environment) as terminal:
        terminal.wait_for(b"tokens/s")
        terminal.wait_for(PROMPT)
        terminal.type(b"/chain\r")
        terminal.wait_for(b" 0:4\r\n")
        terminal.wait_for(PROMPT)
        terminal.type(b"Why?\r")
        terminal.wait_for(b"tokens/s")
        terminal.wait_for(PROMPT)
        terminal.type(b"\x03")
        assert terminal.process.wait(LIMIT_S) == 0
    assert processes_of(model) == []


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_ctrl_c_while_it_starts_leaves_no_process(model, environment, tmp_path):
    with Terminal(command(model), environment) as terminal:
        terminal.wait_for(b"server2")
        terminal.type(b"\x03")
        assert terminal.process.wait(LIMIT_S) == 130
        terminal.wait_for(b"interrupted")
    assert processes_of(model) == []
    assert not list(tmp_path.glob("corolla-demo-*"))


def test_when_it_is_killed_its_servers_leave(model, environment):
    demo = subprocess.Popen(
        command(model, servers=1), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment
    )
    for line in demo.stderr:
        if b"server1: choosing" in line:
            break
    servers = psutil.Process(demo.pid).children()
    assert len(servers) == 1
    demo.kill()
    demo.wait()
    demo.stderr.close()
    _, alive = psutil.wait_procs(servers, timeout=LIMIT_S)
    assert alive == []


def test_when_a_server_fails_the_demo_says_why_and_ends(model, environment, tmp_path):
    done = subprocess.run(
        command(model, servers=1),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=environment | {"COROLLA_SERVER_DEVICE": "abacus"},
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 1
    assert "error: server1 failed: the server ended with status" in done.stderr
    assert "abacus" in done.stderr
    (logs,) = tmp_path.glob("corolla-demo-*")
    assert str(logs) in done.stderr
    assert (logs / "server1.log").exists()
    assert processes_of(model) == []

"""What a crash leaves behind: nothing that keeps the next server from its port and cache; and who starts it again."""

import json
import os
import signal
import subprocess
import sys

import psutil
import pytest

from corolla.testing import ServerProcess, save_tiny_model

ARGUMENTS = ("--threads", "1", "--kv-bytes", str(16 << 20), "--precision", "float32")
pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny_model(tmp_path_factory.mktemp("model")))


def test_a_killed_server_leaves_its_port_and_cache_to_the_next(model, tmp_path, monkeypatch):
    monkeypatch.setenv("COROLLA_HUB_CACHE_DIR", str(tmp_path / "cache"))
    with ServerProcess(model, *ARGUMENTS, log=tmp_path / "first.log") as first:
        address = first.wait_for("online")["addresses"][0]
        first.kill()
    port = address.rpartition(":")[2]
    with ServerProcess(model, *ARGUMENTS, "--port", port, log=tmp_path / "next.log") as following:
        assert following.wait_for("online")["addresses"][0] == address


def lives_of(process):
    """For each time that a server comes online, who it is; then the last two stages."""
    stages = []
    for line in process.stdout:
        if line.startswith(b"{"):
            said = json.loads(line)
            stages.append(said["stage"])
            if said["stage"] == "online":
                yield said["peer"]
    yield stages[-2:]


@pytest.mark.skipif(sys.platform == "win32", reason="processes are not told to end there")
def test_a_supervised_server_is_started_again_and_drains_when_its_supervisor_is_told_to_end(model, tmp_path):
    command = [sys.executable, "-m", "corolla", "serve", model, "--host", "127.0.0.1", "--port", "0", "--json"]
    with (tmp_path / "log").open("wb") as log:
        supervisor = subprocess.Popen([*command, "--restart", *ARGUMENTS], stdout=subprocess.PIPE, stderr=log)
    try:
        lives = lives_of(supervisor)
        peer = next(lives)
        (server,) = psutil.Process(supervisor.pid).children()
        os.kill(server.pid, signal.SIGKILL)
        assert next(lives) == peer, "it has come back as somebody else"
        supervisor.send_signal(signal.SIGTERM)
        assert next(lives) == ["draining", "left"]
        assert supervisor.wait(20) == 0
        assert b"was ended by SIGKILL" in (tmp_path / "log").read_bytes()
    finally:
        supervisor.kill()
        supervisor.stdout.close()
        supervisor.wait()


def test_what_cannot_heal_is_not_started_again(tmp_path):
    command = [sys.executable, "-m", "corolla", "serve", str(tmp_path / "nothing"), "--restart"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert "will not heal by itself" in done.stderr

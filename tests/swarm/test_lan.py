"""With no address given at all, servers join each other and a client finds them: here, on the loopback interface."""

import json

import pytest
from typer.testing import CliRunner

from corolla.cli import app
from corolla.testing import ServerProcess, save_tiny_model

pytest.importorskip("zeroconf", reason="the zeroconf package is not here")
SERVER = ("--threads", "1", "--kv-bytes", str(32 << 20))
pytestmark = pytest.mark.timeout(200)


@pytest.fixture
def model(tmp_path):
    return str(save_tiny_model(tmp_path / "model"))


@pytest.fixture
def invoke(monkeypatch, tmp_path):
    for variable in ("XDG_CONFIG_HOME", "XDG_STATE_HOME"):
        monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.setenv("COROLLA_SWARM_LAN_INTERFACE", "127.0.0.1")  # the servers' too
    monkeypatch.setenv("COROLLA_SWARM_LAN_S", "2")

    def run(*arguments, stdin=None):
        return CliRunner().invoke(app, arguments, input=stdin, prog_name="corolla")

    return run


def test_members_on_one_network_need_no_address_and_others_are_shown_nothing(invoke, model, tmp_path):
    invite = invoke("swarm", "new").stdout.strip()
    with ServerProcess(model, *SERVER, "--blocks", "0:2", "--invite", invite, log=tmp_path / "first.log") as first:
        first.wait_for("joined")
        with ServerProcess(
            model, *SERVER, "--blocks", "2:4", "--invite", invite, log=tmp_path / "second.log"
        ) as second:
            second.wait_for("online")
            done = invoke("swarm", "status", "--json", "--invite", invite)
            assert done.exit_code == 0, done.stderr
            (one,) = json.loads(done.stdout)["models"]
            assert {server["peer"] for server in one["servers"]} == {first.peer_id, second.peer_id}
            flags = ("--prompt", "abc", "--greedy", "--max-new-tokens", "4")
            done = invoke("generate", model, *flags, "--invite", invite)
            assert done.exit_code == 0, done.stderr
            assert f"servers of {model[-64:]} on the local network" in done.stderr
            assert "4 tokens" in done.stderr
            stranger = invoke("swarm", "status", "--json")
            assert stranger.exit_code == 2
            assert "none was found on the local network" in stranger.stderr

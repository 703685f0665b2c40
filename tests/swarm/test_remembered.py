"""Peers find their swarm again without the peer that they once came by, from those that they remember."""

import json
import time

import anyio
import pytest
from typer.testing import CliRunner

from corolla.cli import app
from corolla.testing import ServerProcess, save_tiny_model

SERVER = ("--threads", "1", "--kv-bytes", str(32 << 20), "--no-lan")
REMEMBERED_S = 60.0


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "corolla" / "peers"


def wait_until_remembered(state, peers):
    """Wait until each of the peers is written down somewhere."""
    began_s = time.monotonic()
    while not all(any(peer in file.read_text() for file in state.glob("*.json")) for peer in peers):
        assert time.monotonic() - began_s < REMEMBERED_S
        anyio.run(anyio.sleep, 0.1)


def test_a_restarted_peer_and_a_client_need_no_bootstrap_peer(model, state, tmp_path):
    with (
        ServerProcess(model, "--blocks", "0:4", *SERVER, log=tmp_path / "first.log") as first,
        ServerProcess(model, "--blocks", "0:2", *SERVER, peers=None, log=tmp_path / "left.log") as left,
        ServerProcess(model, "--blocks", "2:4", *SERVER, peers=None, log=tmp_path / "right.log") as right,
    ):
        first.wait_for("online")
        for server in (left, right):
            server.introduce([first.address])
        left.wait_for("online")
        right.wait_for("online")
        wait_until_remembered(state, [left.peer_id, right.peer_id])
        first.kill()
        right.kill()
        with ServerProcess(
            model, "--blocks", "2:4", *SERVER, peers=[first.address], log=tmp_path / "again.log"
        ) as again:
            again.wait_for("online")
            arguments = ("generate", model, "--peer", first.address, "--prompt", "abc", "--greedy", "--json")
            done = CliRunner().invoke(app, arguments, prog_name="corolla")
            assert done.exit_code == 0, done.stderr
            assert [hop["peer"] for hop in json.loads(done.stdout)["chain"]] == [left.peer_id, again.peer_id]

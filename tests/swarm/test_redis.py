"""A swarm of real processes whose directory is kept in a Redis: nobody is told of any peer."""

import json

import pytest
from typer.testing import CliRunner

from corolla.cli import app
from corolla.testing import ServerProcess, save_tiny_model

SERVER = ("--threads", "1", "--kv-bytes", str(32 << 20), "--no-lan")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def invoke(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))

    def run(*arguments):
        done = CliRunner().invoke(app, arguments, prog_name="corolla")
        assert done.exit_code == 0, done.stderr
        return done

    return run


def test_servers_and_clients_find_each_other_by_a_store(model, redis, tmp_path, invoke):
    kept = ("--directory", redis.url())
    with (
        ServerProcess(model, "--blocks", "0:2", *SERVER, *kept, log=tmp_path / "one.log") as one,
        ServerProcess(model, "--blocks", "2:4", *SERVER, *kept, log=tmp_path / "two.log") as two,
    ):
        one.wait_for("online")
        two.wait_for("online")
        said = json.loads(invoke("generate", model, *kept, "--prompt", "abc", "--greedy", "--json").stdout)
        assert said["chain"] == [{"peer": one.peer_id, "span": [0, 2]}, {"peer": two.peer_id, "span": [2, 4]}]
        assert {one["peer"] for one in json.loads(invoke("info", *kept, "--json").stdout)["servers"]} == {
            one.peer_id,
            two.peer_id,
        }
        assert two.peer_id[:8] in invoke("swarm", "status", *kept).stdout
        by_peer = invoke("generate", model, "--peer", one.address, "--prompt", "abc", "--greedy", "--json")
        assert json.loads(by_peer.stdout)["text"] == said["text"]

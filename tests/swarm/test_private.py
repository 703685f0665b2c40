"""A private swarm of real processes serves its members, turns everybody else away, and cuts off whoever was revoked."""

import json
import time

import pytest
import torch
from typer.testing import CliRunner

from corolla.cli import app
from corolla.client import AutoModelForCausalLM, ClientConfig, Swarm
from corolla.errors import Error, NotAMember
from corolla.server import Server, ServerConfig
from corolla.swarm import SwarmConfig
from corolla.swarm.members.owner import OwnedSwarm
from corolla.testing import LocalSwarm, ServerProcess, save_tiny_model

GREEDY = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
PROMPT_BT = torch.tensor([[5, 6, 7]])
SOON_S = 30.0
SERVER = ("--threads", "1", "--kv-bytes", str(32 << 20))
pytestmark = pytest.mark.timeout(200)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The configuration directory of the swarm's owner."""
    return tmp_path_factory.mktemp("config")


@pytest.fixture(scope="module", autouse=True)
def state(tmp_path_factory):
    """Where servers on this machine remember things."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(directory := tmp_path_factory.mktemp("state")))
        yield directory / "corolla"


@pytest.fixture(scope="module")
def owned(home):
    return OwnedSwarm.create(home / "corolla" / "swarms", "lab")


@pytest.fixture(scope="module")
def swarm(owned, model, tmp_path_factory):
    invite = owned.invite(allows="serve", name="servers")
    logs = tmp_path_factory.mktemp("logs")
    with LocalSwarm(model, ["0:2", "2:4"], *SERVER, "--invite", invite.line, logs=logs) as swarm:
        yield swarm.wait_until_online()


@pytest.fixture
def invoke(monkeypatch, home):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home))

    def run(*arguments):
        return CliRunner().invoke(app, arguments, prog_name="corolla")

    return run


def entering(owned, swarm, **changes):
    """Give an invite that is enough to enter by."""
    return owned.invite(peers=(swarm.address,), **changes)


def generate(model, invite):
    with Swarm(invite=invite.line, config=ClientConfig(chain_s=SOON_S)) as swarm:
        remote = AutoModelForCausalLM.from_pretrained(model, swarm=swarm)
        return remote.generate(PROMPT_BT, **GREEDY)


def seen(invoke, invite):
    """List the servers that the status of the swarm shows."""
    done = invoke("swarm", "status", "--invite", invite.line, "--json")
    assert done.exit_code == 0, done.stderr
    return {server["peer"] for model in json.loads(done.stdout)["models"] for server in model["servers"]}


def test_an_invite_alone_is_enough_to_use_the_swarm(owned, swarm, model):
    assert generate(model, entering(owned, swarm, allows="use")).shape[1] > PROMPT_BT.shape[1]


def test_a_server_is_not_used_by_who_may_only_serve(owned, swarm, model):
    with pytest.raises(NotAMember, match="allows serving and not using"):
        generate(model, entering(owned, swarm, allows="serve"))


@pytest.mark.parametrize("invite", [None, "another"])
def test_strangers_are_turned_away(swarm, tmp_path, invite):
    line = invite and OwnedSwarm.create(tmp_path, "other").invite().line
    with pytest.raises(NotAMember, match="invite"):
        Swarm(swarm.address, invite=line).close()


def test_a_server_without_the_right_to_serve_does_not_start(owned, swarm, model):
    invite = entering(owned, swarm, allows="use")
    with pytest.raises(NotAMember, match="allows using the swarm and not serving"):
        Server(ServerConfig(model=model), swarm=SwarmConfig(invite=invite.line))


def test_the_status_of_the_swarm_is_shown_to_members(invoke, owned, swarm):
    invite = entering(owned, swarm, allows="use")
    done = invoke("swarm", "status", "--invite", invite.line)
    assert done.exit_code == 0, done.stderr
    for server in swarm.servers:
        assert server.peer_id[:8] in done.stdout
    assert "every block has 1 or more" in done.stdout
    assert "problems" not in done.stdout
    said = json.loads(invoke("swarm", "status", "--invite", invite.line, "--json").stdout)
    assert said["swarm"] == owned.id
    (one,) = said["models"]
    assert said["dropped"].keys() <= {"stranger"}  # whoever was revoked before
    assert (one["blocks"], one["servers_of_block"], one["problems"]) == (4, [1, 1, 1, 1], {})
    assert all(0 < server["rtt_s"] < SOON_S for server in one["servers"])
    assert "membership" not in one["servers"][0]


def test_a_revoked_server_is_cut_off_and_the_others_go_on(invoke, owned, swarm, model, tmp_path, state):
    guest, user = entering(owned, swarm, name="guest"), entering(owned, swarm, allows="use")
    with ServerProcess(model, *SERVER, "--blocks", "0:4", "--invite", guest.line, log=tmp_path / "log") as server:
        server.wait_for("online")
        assert len(seen(invoke, user)) == 3
        only_it = ClientConfig(allow_peers=(server.peer_id,), chain_s=1.0)
        with Swarm(server.address, invite=user.line, config=only_it) as view:
            remote = AutoModelForCausalLM.from_pretrained(model, swarm=view)
            with remote.session() as session:
                tokens_BT = remote.generate(PROMPT_BT, session=session, **GREEDY)
                done = invoke("swarm", "revoke", guest.grant.invite[:10])
                assert done.exit_code == 0, done.stderr
                assert "servers told: 2" in done.stderr
                begin_s = time.monotonic()
                while server.peer_id in seen(invoke, user) or server.peer_id in peers_of(view):
                    assert time.monotonic() - begin_s < SOON_S
                with pytest.raises(Error):
                    remote.generate(tokens_BT, session=session, **GREEDY)
        assert server.process.wait(SOON_S) == 2  # it has heard so, and says why
        assert "any more: invite" in (tmp_path / "log").read_text()
        assert seen(invoke, user) == {one.peer_id for one in swarm.servers}
        with pytest.raises(NotAMember, match="was revoked"):
            Swarm(swarm.address, invite=guest.line).close()
        assert generate(model, user).shape[1] > PROMPT_BT.shape[1]
    again = SwarmConfig(invite=guest.line, state=state)  # as if all servers had started again
    with pytest.raises(NotAMember, match="was revoked"):
        Server(ServerConfig(model=model), swarm=again)


def peers_of(view):
    return {server.peer for server in view.snapshot().announcements}

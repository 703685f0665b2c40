"""Servers move to where they are needed: over real processes, within a bounded time, and without losing anything."""

import threading
from contextlib import ExitStack

import pytest
import torch
import transformers

from corolla.client import AutoModelForCausalLM, ClientConfig, Swarm
from corolla.testing import ServerProcess, save_tiny_model

GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
ARGUMENTS = ("--threads", "1", "--kv-bytes", str(16 << 20), "--dtype", "float32", "--log-level", "info")
HURRY = {"SERVER_LOOK_S": "0.3", "SERVER_SETTLE_S": "0.3", "SWARM_TTL_S": "3", "SWARM_REFRESH_S": "0.5"}
pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def start(model, tmp_path, monkeypatch):
    """Starts servers that think fast, one after the other."""
    for name, value in HURRY.items():
        monkeypatch.setenv(f"COROLLA_{name}", value)
    servers = []
    with ExitStack() as stack:

        def start_one(*arguments):
            peers = [servers[0].address] if servers else ()
            log = tmp_path / f"server{len(servers)}.log"
            server = stack.enter_context(ServerProcess(str(model), *ARGUMENTS, *arguments, peers=peers, log=log))
            servers.append(server)
            server.wait_for("online")
            return server

        yield start_one
        for server in servers:
            server.leave()


class Asker:
    """A client that knows what the whole model says."""

    def __init__(self, model, address):
        local = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.prompt_BT = torch.arange(3, 12)[None]
        self.expected_BT = local.generate(self.prompt_BT, **GREEDY)
        self.swarm = Swarm(address, config=ClientConfig(codec="raw", chain_s=30.0))
        self.model = AutoModelForCausalLM.from_pretrained(str(model), swarm=self.swarm, dtype=torch.float32)

    def ask(self):
        assert torch.equal(self.model.generate(self.prompt_BT, **GREEDY), self.expected_BT)


def test_a_spare_moves_into_the_gap_that_a_death_leaves(model, start):
    first, last = start("--blocks", "0:2"), start("--blocks", "2:4")
    spare = start("--num-blocks", "2")
    assert spare.stages["online"]["span"] in ([0, 2], [2, 4])
    gap, killed = ("2:4", last) if spare.stages["online"]["span"] == [0, 2] else ("0:2", first)
    alive = first if killed is last else last
    asker = Asker(model, alive.address)
    with asker.swarm:
        asker.ask()
        before = spare.peer_id, spare.address
        killed.kill()
        spare.wait_for("online", span=gap, within_s=30.0)
        assert (spare.peer_id, spare.address) == before
        asker.ask()


def test_a_covered_model_answers_all_the_time_that_a_server_moves(model, start):
    first = start("--blocks", "0:2")
    start("--blocks", "2:4")
    mover = start("--num-blocks", "2")
    here = mover.stages["online"]["span"]
    other = "2:4" if here == [0, 2] else "0:2"
    asker = Asker(model, first.address)
    has_moved, answers = threading.Event(), 0

    def crowd():
        start("--blocks", "{}:{}".format(*here))  # so that it would do more good elsewhere
        start("--blocks", "{}:{}".format(*here))
        mover.wait_for("online", span=other, within_s=60.0)
        has_moved.set()

    crowding = threading.Thread(target=crowd)
    crowding.start()
    with asker.swarm:
        while crowding.is_alive():
            asker.ask()
            answers += 1
        asker.ask()
    crowding.join()
    assert has_moved.is_set()
    assert answers > 3

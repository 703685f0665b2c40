"""Over server processes a model says, token by token, what it says in one piece: however many hops its chain has."""

# B batch, T tokens

import json
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from functools import partial

import anyio
import pytest
import torch
import transformers
from transformers.utils import logging as transformers_logging

from corolla.client import AutoModelForCausalLM, ClientConfig, Swarm
from corolla.errors import Error
from corolla.hub import HubConfig, open_repository
from corolla.testing import LocalSwarm, save_tiny_model

NEW_TOKENS = 12
GREEDY = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
SERVER = ("--threads", "1", "--kv-bytes", str(64 << 20), "--precision", "float32")
pytestmark = pytest.mark.timeout(280)


@pytest.fixture(scope="module")
def smollm2():
    """The demo model's directory."""
    try:
        repository = open_repository("smollm2", config=HubConfig(offline=True))
    except Error as error:
        pytest.skip(f"the demo model is not here, and tests download nothing: {error.message}")
    return repository.fetch(set(repository.weight_map.values()))


def chains_of(count):
    """The spans of a model's servers, so that it has chains of one, two and three hops."""
    third, most = count // 3, count - count // 3
    return {
        1: [f"0:{count}"],
        2: [f"0:{third}", f"{third}:{count}"],
        3: [f"0:{third}", f"{third}:{most}", f"{most}:{count}"],
    }


class Case:
    """A model in one piece, and the addresses of servers that have it in one, in two and in three pieces."""

    def __init__(self, directory, count, servers):
        self.directory = str(directory)
        self.chains = chains_of(count)
        self.servers = servers
        self.local = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)

    @contextmanager
    def model(self, hops):
        """The model with its blocks on a chain of so many hops."""
        peers = [self.servers[span].rpartition("/")[2] for span in self.chains[hops]]
        config = ClientConfig(codec="raw", allow_peers=tuple(peers))
        with Swarm([*self.servers.values()][0], config=config) as swarm:
            yield AutoModelForCausalLM.from_pretrained(self.directory, swarm=swarm, dtype=torch.float32)

    def prompt(self, tokens, seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, 98, (1, tokens), generator=generator)


def check(case):
    """Cached, uncached, after a rewind, and among others: the same tokens on every chain."""
    first_BT, second_BT = case.prompt(9, seed=1), case.prompt(12, seed=2)
    joined_BT = torch.cat([first_BT[:, :5], second_BT], dim=1)
    say = partial(case.local.generate, **GREEDY)
    expected = {"first": say(first_BT), "second": say(second_BT), "joined": say(joined_BT)}
    for hops in case.chains:
        with case.model(hops) as model, model.session(128) as session:
            assert torch.equal(model.generate(first_BT, session=session, **GREEDY), expected["first"])
            assert len(session.chain.hops) == hops
            assert torch.equal(model.generate(joined_BT, session=session, **GREEDY), expected["joined"])
            session.position = 0
            assert torch.equal(model.generate(second_BT, session=session, **GREEDY), expected["second"])
            few = GREEDY | {"max_new_tokens": 3, "use_cache": False}
            assert torch.equal(model.generate(first_BT, **few), expected["first"][:, : 9 + 3])
            anyio.run(check_together, model, {"first": first_BT, "second": second_BT}, expected)


async def check_together(model, prompts, expected):
    """Several sessions at the same time, whose steps the servers compute together."""
    async with anyio.create_task_group() as tasks:

        async def check_one(name):
            said = await anyio.to_thread.run_sync(partial(model.generate, prompts[name], **GREEDY))
            assert torch.equal(said, expected[name])

        for name in ("first", "second", "first"):
            tasks.start_soon(check_one, name)


def test_smollm2_says_the_same_over_one_two_and_three_servers(smollm2, tmp_path):
    spans = [*dict.fromkeys(span for chain in chains_of(30).values() for span in chain)]
    with LocalSwarm(str(smollm2), spans, *SERVER, logs=tmp_path) as servers:
        servers.wait_until_online()
        check(Case(smollm2, 30, {span: server.address for span, server in zip(spans, servers.servers, strict=True)}))


# Processes take long to start, so three of them have the servers of all tiny models: no two hops of a chain are in one.
PROGRAM = """
import json, sys, torch
from contextlib import ExitStack
from corolla.testing import ThreadedSwarm
torch.set_num_threads(1)
with ExitStack() as stack:
    for line in sys.stdin:
        model, spans, peers = json.loads(line)
        swarm = stack.enter_context(ThreadedSwarm(model, spans, peers=peers))
        print(json.dumps({str(server.server.span): server.address for server in swarm.servers}), flush=True)
"""
SHARES = [["0:4", "0:1"], ["1:4", "3:4"], ["1:3"]]


@pytest.fixture(scope="module")
def programs():
    with ExitStack() as stack:
        command = [sys.executable, "-c", PROGRAM]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        yield [stack.enter_context(subprocess.Popen(command, **pipes)) for _ in SHARES]


def serve(program, model, spans, peers):
    """Let a process serve some spans of a model too, and give the addresses."""
    program.stdin.write(json.dumps([str(model), spans, peers]) + "\n")
    program.stdin.flush()
    return json.loads(program.stdout.readline())


@pytest.mark.parametrize("family", ["gemma3_text", "bloom", "qwen3_moe"])
def test_a_tiny_model_says_the_same_over_one_two_and_three_servers(family, programs, tmp_path):
    transformers_logging.disable_progress_bar()
    directory, servers = save_tiny_model(tmp_path / "model", family=family), {}
    for program, spans in zip(programs, SHARES, strict=True):
        servers |= serve(program, directory, spans, [*servers.values()][:1])
    check(Case(directory, 4, servers))

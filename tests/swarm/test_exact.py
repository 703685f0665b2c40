"""Over server processes a model says, token by token, what it says in one piece: however many hops its chain has."""

# B batch, T tokens

from contextlib import contextmanager
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
SERVER = ("--threads", "1", "--kv-bytes", str(64 << 20), "--dtype", "float32")
pytestmark = pytest.mark.timeout(280)


@pytest.fixture(scope="module")
def smollm2():
    """The demo model's directory."""
    try:
        repository = open_repository("smollm2", config=HubConfig(offline=True))
    except Error as error:
        pytest.skip(f"the demo model is not here, and tests download nothing: {error.message}")
    return repository.fetch(set(repository.weight_map.values()))


class Case:
    """A model in one piece and a swarm of processes that has it in one, in two and in three pieces."""

    def __init__(self, directory, count, logs):
        self.directory = str(directory)
        self.count = count
        third, most = count // 3, count - count // 3
        self.chains = {
            1: [f"0:{count}"],
            2: [f"0:{third}", f"{third}:{count}"],
            3: [f"0:{third}", f"{third}:{most}", f"{most}:{count}"],
        }
        self.spans = [*dict.fromkeys(span for spans in self.chains.values() for span in spans)]
        self.servers = LocalSwarm(self.directory, self.spans, *SERVER, logs=logs)
        self.local = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)

    @contextmanager
    def model(self, hops):
        """The model with its blocks on a chain of so many hops."""
        peers = [self.servers.servers[self.spans.index(span)].peer_id for span in self.chains[hops]]
        config = ClientConfig(codec="raw", allow_peers=tuple(peers))
        with Swarm(self.servers.address, config=config) as swarm:
            yield AutoModelForCausalLM.from_pretrained(self.directory, swarm=swarm, dtype=torch.float32)

    def prompt(self, tokens, seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, 98, (1, tokens), generator=generator)


@contextmanager
def case_of(directory, logs):
    transformers_logging.disable_progress_bar()
    count = transformers.AutoConfig.from_pretrained(directory).num_hidden_layers
    case = Case(directory, count, logs)
    with case.servers:
        case.servers.wait_until_online()
        yield case


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


@pytest.mark.parametrize("family", ["gemma3_text", "bloom", "qwen3_moe"])
def test_a_tiny_model_says_the_same_over_one_two_and_three_servers(family, tmp_path):
    directory = save_tiny_model(tmp_path / "model", family=family)
    with case_of(directory, tmp_path) as case:
        check(case)


def test_smollm2_says_the_same_over_one_two_and_three_servers(smollm2, tmp_path):
    with case_of(smollm2, tmp_path) as case:
        check(case)

"""A model with somebody's adapter says what PEFT says beside the model in one piece, also among others."""

# B batch, T tokens

from functools import partial

import anyio
import pytest
import torch
import transformers

from corolla.client import AutoModelForCausalLM, AutoModelForTokenClassification, ClientConfig, Swarm
from corolla.client.adapting import read_adapter
from corolla.errors import BadAdapter, WrongBase
from corolla.server.hosting import read_blocks
from corolla.sharing import open_files
from corolla.terms import Span
from corolla.testing import ThreadedSwarm, save_tiny_adapter

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{words}")  # of PEFT, about itself
    for words in ("`is_gradient_checkpointing` is deprecated", "Found missing adapter keys", "Position ids are not")
]
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
SETTINGS = {
    "plain": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "stabilised": {"r": 2, "lora_alpha": 3, "target_modules": ["k_proj"], "use_rslora": True},
    "patterns": {
        "r": 3,
        "target_modules": ["o_proj", "up_proj"],
        "alpha_pattern": {"up_proj": 9},
        "rank_pattern": {"o_proj": 5},
    },
}


def prompt(seed=1):
    return torch.randint(3, 98, (1, 9), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def adapters(pairs, tmp_path_factory):
    """Directories with adapters, and what the model in one piece says with each."""
    found = {}
    for name, settings in SETTINGS.items():
        directory = tmp_path_factory.mktemp("adapter") / name
        model = save_tiny_adapter(directory, pairs["llama"].directory, **settings)
        found[name] = directory, model.generate(input_ids=prompt(), **GREEDY)
    return found


def with_adapter(pair, servers, directory):
    swarm = Swarm(servers.address, config=ClientConfig(codec="raw", adapter=str(directory)))
    model = AutoModelForCausalLM.from_pretrained(str(pair.directory), swarm=swarm)
    return swarm, model


def test_many_adapters_in_one_batch_say_what_each_says_alone(pairs, adapters):
    pair = pairs["llama"]
    plain = pair.local.generate(prompt(), **GREEDY)
    assert any(not torch.equal(said, plain) for _, said in adapters.values())
    with ThreadedSwarm(str(pair.directory), ["0:1", "1:4"]) as servers:
        opened = {name: with_adapter(pair, servers, directory) for name, (directory, _) in adapters.items()}
        said = {}

        async def say(name, model):
            said[name] = await anyio.to_thread.run_sync(partial(model.generate, input_ids=prompt(), **GREEDY))

        async def say_all():
            async with anyio.create_task_group() as tasks:
                for name, (_, model) in opened.items():
                    tasks.start_soon(say, name, model)
                with Swarm(servers.address, config=ClientConfig(codec="raw")) as swarm:
                    bare = AutoModelForCausalLM.from_pretrained(str(pair.directory), swarm=swarm)
                    await say("none", bare)

        anyio.run(say_all)
        for swarm, _ in opened.values():
            swarm.close()
    assert torch.equal(said["none"], plain)
    for name, (_, expected) in adapters.items():
        assert torch.equal(said[name], expected), name


@pytest.mark.parametrize("name", SETTINGS)
def test_what_servers_read_from_files_has_the_names_that_clients_say(pairs, adapters, name):
    pair = pairs["llama"]
    directory, _ = adapters[name]
    swarm, model = with_adapter(pair, pair.servers, directory)
    with swarm:
        stand_ins = model.get_base_model().blocks._stand_ins
        mine = {index: one.hash for index, one in read_adapter(stand_ins).encoded.items()}
    hosted = read_blocks(open_files(directory), Span(1, 3))
    assert {index: one.hash for index, one in hosted.items()} == {index: mine[index] for index in (1, 2)}


def test_what_is_no_adapter_is_refused_on_either_side(pairs, adapters, tmp_path):
    for family, directory, error, words in (
        ("llama", tmp_path, BadAdapter, "no adapter in PEFT's format: it has no adapter_config.json"),
        ("gemma3_text", adapters["plain"][0], WrongBase, r"is for .*llama.* \(\w{12}\), not for .*gemma3_text"),
    ):
        pair = pairs[family]
        config = ClientConfig(codec="raw", adapter=str(directory))
        with Swarm(pair.servers.address, config=config) as swarm, pytest.raises(error, match=words):
            AutoModelForCausalLM.from_pretrained(str(pair.directory), swarm=swarm)


def test_tokens_are_classified_as_by_the_model_in_one_piece(pairs):
    pair = pairs["llama"]
    torch.manual_seed(0)
    local = transformers.AutoModelForTokenClassification.from_pretrained(pair.directory, dtype=torch.float32)
    remote = AutoModelForTokenClassification.from_pretrained(str(pair.directory), swarm=pair.swarm)
    remote.score.load_state_dict(local.score.state_dict())
    labels_BT = prompt() % 2
    losses = [model.eval()(input_ids=prompt(), labels=labels_BT).loss for model in (remote, local)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    assert torch.equal(remote.score.weight.grad, local.score.weight.grad)

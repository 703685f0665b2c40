"""What PEFT trains beside a model whose blocks are elsewhere is what it trains beside the model in one piece."""

# B batch, T tokens

from functools import partial

import anyio
import anyio.to_thread
import peft
import pytest
import torch
import transformers

from corolla.client import AutoModelForCausalLM, ClientConfig, Swarm
from corolla.errors import UsageError
from corolla.testing import ThreadedSwarm

LAYERS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gemma3_text": ["q_proj", "o_proj"],
    "bloom": ["query_key_value"],
    "gpt2": ["c_attn", "c_proj"],
    "qwen3_moe": ["k_proj"],
}
METHODS = {
    "lora": lambda family: peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=LAYERS[family], init_lora_weights=False
    ),
    "prompt": lambda _: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p": lambda _: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
    "prefix": lambda _: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}
CASES = [
    *(("llama", method) for method in METHODS),
    *((family, method) for family in ("gemma3_text", "gpt2", "qwen3_moe") for method in ("lora", "prefix")),
    ("bloom", "lora"),
]
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{words}")  # of PEFT, about itself
    for words in (
        "Position ids are not supported",
        "fan_in_fan_out is set to",
        "Could not find a config file",
        "`is_gradient_checkpointing` is deprecated",
        "`lora_bias=True` was passed",
    )
]
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def prompt(rows=2, tokens=9, seed=1):
    return torch.randint(3, 98, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def ragged():
    mask_BT = torch.ones(2, 9, dtype=torch.long)
    mask_BT[1, :3] = 0
    return prompt(), mask_BT


def local_of(pair):
    return transformers.AutoModelForCausalLM.from_pretrained(pair.directory, dtype=torch.float32)


def remote_of(pair):
    return AutoModelForCausalLM.from_pretrained(str(pair.directory), swarm=pair.swarm)


def tuned(pair, method):
    """A model in one piece and one in a swarm, with the same adapter."""
    config = METHODS[method](pair.local.config.model_type)
    local, remote = peft.get_peft_model(local_of(pair), config), peft.get_peft_model(remote_of(pair), config)
    mine, theirs = trained(remote), trained(local)
    assert list(mine) == list(theirs)
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.copy_(theirs[name])
    return local.eval(), remote.eval()


def trained(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def losses(model, ids_BT, mask_BT):
    loss = model(input_ids=ids_BT, attention_mask=mask_BT, labels=ids_BT).loss
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize(("family", "method"), CASES)
def test_losses_gradients_and_tokens_are_equal(pairs, family, method):
    local, remote = tuned(pairs[family], method)
    ids_BT, mask_BT = ragged()
    assert torch.equal(losses(remote, ids_BT, mask_BT), losses(local, ids_BT, mask_BT))
    mine, theirs = trained(remote), trained(local)
    assert all(torch.equal(mine[name].grad, theirs[name].grad) for name in theirs)
    assert any(theirs[name].grad.abs().max() > 0 for name in theirs)
    assert torch.equal(remote.generate(ids_BT, **GREEDY), local.generate(ids_BT, **GREEDY))


@pytest.mark.parametrize("method", METHODS)
def test_what_one_saves_the_other_loads(pairs, method, tmp_path):
    local, remote = tuned(pairs["llama"], method)
    local.save_pretrained(tmp_path / "local")
    remote.save_pretrained(tmp_path / "remote")
    expected = local(prompt()).logits
    here = peft.PeftModel.from_pretrained(remote_of(pairs["llama"]), tmp_path / "local").eval()
    there = peft.PeftModel.from_pretrained(local_of(pairs["llama"]), tmp_path / "remote").eval()
    assert torch.equal(here(prompt()).logits, expected)
    assert torch.equal(there(prompt()).logits, expected)


def test_a_training_goes_the_same_way_step_by_step(pairs):
    models = tuned(pairs["llama"], "lora")
    steps = [torch.optim.AdamW(trained(model).values(), lr=1e-2) for model in models]
    for seed in range(4):
        found = [losses(model, prompt(seed=seed), None) for model in models]
        assert torch.equal(*found)
        for optimizer in steps:
            optimizer.step()
            optimizer.zero_grad()
    theirs = trained(models[0])
    assert all(torch.equal(parameter, theirs[name]) for name, parameter in trained(models[1]).items())


def test_user_code_may_stand_between_blocks_that_have_adapters(pairs):
    local, remote = tuned(pairs["llama"], "lora")
    ids_BT = prompt()
    hidden_BTD = local(ids_BT, output_hidden_states=True).hidden_states
    blocks = remote.blocks
    first_BTD = blocks[:1](hidden_BTD[0].detach())
    assert torch.equal(first_BTD, hidden_BTD[1])
    assert torch.equal(blocks[1:3](first_BTD), hidden_BTD[3])
    (2 * blocks[3](blocks[1:3](first_BTD))).sum().backward()
    assert all(parameter.grad is not None for parameter in trained(remote).values())


def test_an_adapter_can_be_put_aside(pairs):
    """Petals defect J: the adapter in use was a global of the server's process; here each request names its own."""
    local, remote = tuned(pairs["llama"], "lora")
    with remote.disable_adapter():
        assert torch.equal(remote(prompt()).logits, pairs["llama"].local(prompt()).logits)
    assert torch.equal(remote(prompt()).logits, local(prompt()).logits)


def test_adapters_that_are_used_at_once_do_not_disturb_each_other(pairs):
    """Petals defect J: two clients train and speak with adapters of their own, and a third with none, on one server."""
    pair = pairs["llama"]
    models = [tuned(pair, "lora") for _ in range(2)]
    speakers = [peft.get_peft_model(remote_of(pair), METHODS["lora"]("llama")).eval() for _ in models]
    ids_BT = prompt()
    for scale, (local, remote), speaker in zip((1.0, -3.0), models, speakers, strict=True):
        with torch.no_grad():
            for model in (local, remote):
                for parameter in trained(model).values():
                    parameter.mul_(scale)
        speaker.load_state_dict(trained(local), strict=False)
        losses(local, ids_BT, None)
    said = [model.generate(ids_BT, **GREEDY) for model in (models[0][0], models[1][0], local_of(pair))]
    assert not torch.equal(said[0], said[1])
    training = [partial(losses, remote, ids_BT, None) for _, remote in models]
    speaking = [partial(one.generate, ids_BT, **GREEDY) for one in [*speakers, remote_of(pair)]]
    for _ in range(3):
        for _, remote in models:
            remote.zero_grad()
        heard = anyio.run(at_once, training + speaking)
        assert all(torch.equal(*texts) for texts in zip(heard[2:], said, strict=True))
        for local, remote in models:
            assert_same_gradients(remote, local)


async def at_once(functions):
    """Call functions, each on a thread of its own."""
    results = {}

    async def call(function):
        results[function] = await anyio.to_thread.run_sync(function)

    async with anyio.create_task_group() as tasks:
        for function in functions:
            tasks.start_soon(call, function)
    return [results[function] for function in functions]


def assert_same_gradients(model, other):
    theirs = trained(other)
    for name, parameter in trained(model).items():
        expected = theirs[name].grad
        assert (parameter.grad - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_a_batch_over_several_chains_has_the_gradients_of_one(pairs):
    pair = pairs["llama"]
    local, _ = tuned(pair, "lora")
    ids_BT = prompt(rows=8)
    losses(local, ids_BT, None)
    theirs = trained(local)
    config = ClientConfig(codec="raw", batch_tokens=18, chain_tokens=18)
    with (
        ThreadedSwarm(str(pair.directory), ["0:4", "0:2", "2:4"]) as servers,
        Swarm(servers.address, config=config) as swarm,
    ):
        model = AutoModelForCausalLM.from_pretrained(str(pair.directory), swarm=swarm)
        remote = peft.get_peft_model(model, METHODS["lora"]("llama"))
        remote.load_state_dict(theirs, strict=False)
        losses(remote, ids_BT, None)
    assert_same_gradients(remote, local)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"lora_dropout": 0.1}, "lora_dropout 0.1, which servers cannot do; set 0"),
        ({"lora_bias": True, "bias": "none"}, "variant of LoRA that servers do not know"),
    ],
)
def test_what_servers_cannot_add_is_refused_by_name(pairs, config, words):
    settings = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"]} | config
    model = peft.get_peft_model(remote_of(pairs["llama"]), peft.LoraConfig(**settings)).train()
    with pytest.raises(UsageError, match=words) as caught:
        model(prompt())
    assert "self_attn.q_proj of block 0" in caught.value.message


def test_other_methods_are_refused_by_name(pairs):
    config = peft.IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[])
    model = peft.get_peft_model(remote_of(pairs["llama"]), config)
    with pytest.raises(UsageError, match=r"which add LoRA and prefixes; Linear cannot be added there"):
        model(prompt())


def test_mixed_precision_works_as_in_torch(pairs):
    local, remote = tuned(pairs["llama"], "prompt")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    gradients = []
    for model in (local, remote):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=prompt(), labels=prompt()).loss
        assert loss.dtype == torch.float32
        optimizer = torch.optim.SGD(trained(model).values(), lr=1e-3)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        gradients.append(next(iter(trained(model).values())).grad.clone())
        scaler.step(optimizer)
        scaler.update()
    # Autocast rounds the products of the blocks that are here; those on servers stay in float32.
    assert (gradients[0] - gradients[1]).abs().max() <= 0.1 * gradients[0].abs().max()

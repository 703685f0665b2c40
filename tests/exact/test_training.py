"""Training loops of all kinds do beside a swarm what they do beside the model in one piece, and fail by name."""

# B batch, T tokens, D model width

from types import SimpleNamespace

import accelerate
import peft
import pytest
import torch
import transformers
from torch import nn

from corolla.client import AutoModelForCausalLM, AutoModelForSequenceClassification, ClientConfig, Swarm
from corolla.client.blocks import _share_out
from corolla.client.requests import Batch
from corolla.errors import ContextTooLong, Diverged
from corolla.swarm import SwarmConfig
from corolla.swarm.transports.tls import TlsTransport
from corolla.testing import CountingTransport, ThreadedSwarm, save_tiny_model
from corolla.tuning import Training

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{words}")  # of PEFT, accelerate and torch, about themselves
    for words in (
        "`is_gradient_checkpointing` is deprecated",
        "Position ids are not supported",
        "'pin_memory' argument is set as true",
        "Detected call of",
    )
]
LORA = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A tiny model in one piece, and the same with its blocks in a swarm."""
    torch.set_num_threads(1)
    directory = save_tiny_model(tmp_path_factory.mktemp("llama"))
    config = ClientConfig(codec="raw")
    with ThreadedSwarm(str(directory), ["0:1", "1:4"]) as servers, Swarm(servers.address, config=config) as swarm:
        made = SimpleNamespace(directory=directory, servers=servers, swarm=swarm)
        made.local, made.remote = local_of(made), remote_of(made)
        yield made


def prompt(rows=2, tokens=9, seed=1):
    return torch.randint(3, 98, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def local_of(pair):
    return transformers.AutoModelForCausalLM.from_pretrained(pair.directory, dtype=torch.float32)


def remote_of(pair, swarm=None):
    return AutoModelForCausalLM.from_pretrained(str(pair.directory), swarm=swarm or pair.swarm)


def trained(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def with_lora(*models):
    """The same adapter on all of them."""
    config = peft.LoraConfig(**LORA)
    first, *others = [peft.get_peft_model(model, config) for model in models]
    for other in others:
        with torch.no_grad():
            for name, parameter in trained(other).items():
                parameter.copy_(trained(first)[name])
    return first, *others


def assert_equal(one, other):
    mine, theirs = trained(one), trained(other)
    assert mine
    assert all(torch.equal(mine[name], parameter) for name, parameter in theirs.items())


def close(actual, expected):
    return bool((actual - expected).abs().max() <= 2e-5 * expected.abs().max())


def test_the_trainer_of_transformers_trains_as_beside_the_whole_model(pair, tmp_path):
    models = with_lora(local_of(pair), remote_of(pair))
    before = {name: parameter.clone() for name, parameter in trained(models[0]).items()}
    texts = [{"input_ids": ids, "labels": ids} for ids in prompt(rows=8)]
    for index, model in enumerate(models):
        arguments = transformers.TrainingArguments(
            str(tmp_path / str(index)), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2,
            learning_rate=1e-2, warmup_steps=1, use_cpu=True, report_to=[], save_strategy="steps", save_steps=2,
            disable_tqdm=True, seed=4, dataloader_pin_memory=False,
        )  # fmt: skip
        transformers.Trainer(model, arguments, train_dataset=texts).train()
    assert_equal(*models)
    assert not any(torch.equal(parameter, before[name]) for name, parameter in trained(models[1]).items())
    assert (tmp_path / "1" / "checkpoint-2" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_trains_as_beside_the_whole_model(pair, precision):
    models = with_lora(local_of(pair), remote_of(pair))
    found = []
    for model in models:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # which transformers' trainer leaves
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
        optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-2)
        model, optimizer = accelerator.prepare(model, optimizer)
        for step in range(4):
            with accelerator.accumulate(model):
                accelerator.backward(model(input_ids=prompt(seed=step), labels=prompt(seed=step)).loss)
                optimizer.step()
                optimizer.zero_grad()
        found.append(torch.cat([one.detach().flatten() for one in trained(model).values()]))
        accelerator.free_memory()
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    local, remote = found
    if precision == "no":
        assert torch.equal(local, remote)
    else:  # the blocks that are here are computed in bfloat16, those on servers are not
        assert (local - remote).abs().max() <= 0.05


def test_a_scaler_skips_a_step_whose_gradients_are_too_large_for_the_format(pair):
    (model,) = with_lora(remote_of(pair))
    before = {name: parameter.clone() for name, parameter in trained(model).items()}
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    optimizer = torch.optim.SGD(trained(model).values(), lr=1.0)
    scaler.scale(1e3 * model(input_ids=prompt(), labels=prompt()).loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**126
    assert all(torch.equal(parameter, before[name]) for name, parameter in trained(model).items())


def test_a_head_on_any_hidden_state_trains_as_beside_the_whole_model(pair):
    torch.manual_seed(0)
    head = nn.Linear(64, 5)
    found = []
    for model, wish in ((pair.local, True), (pair.remote, (2,))):
        embeddings_BTD = model.get_input_embeddings()(prompt()).detach().requires_grad_()
        hidden_BTD = model(inputs_embeds=embeddings_BTD, output_hidden_states=wish, use_cache=False).hidden_states[2]
        loss = nn.functional.cross_entropy(head(hidden_BTD[:, -1]), torch.tensor([1, 4]))
        found.append((loss, *torch.autograd.grad(loss, (embeddings_BTD, head.weight))))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*found, strict=True))


def test_a_module_between_blocks_trains_as_inside_the_whole_model(pair):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 64))
    local, remote = local_of(pair), remote_of(pair)
    hook = local.model.layers[1].register_forward_hook(lambda _, __, output: output + module(output))
    expected_BTV = local(prompt()).logits
    hook.remove()
    hidden_BTD = remote.blocks[:2](remote.get_input_embeddings()(prompt()))
    hidden_BTD = remote.blocks[2:](hidden_BTD + module(hidden_BTD))
    actual_BTV = remote.lm_head(remote.model.norm(hidden_BTD))
    grads = [torch.autograd.grad(one.square().mean(), list(module.parameters())) for one in (actual_BTV, expected_BTV)]
    assert torch.equal(actual_BTV, expected_BTV)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*grads, strict=True))


def test_soft_prompts_and_a_classifier_train_together(pair):
    found = []
    for kind, place in (
        (transformers.AutoModelForSequenceClassification, {"dtype": torch.float32}),
        (AutoModelForSequenceClassification, {"swarm": pair.swarm}),
    ):
        torch.manual_seed(0)
        model = kind.from_pretrained(str(pair.directory), **place)
        model.config.pad_token_id = 0
        model = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=20)).eval()
        found.append(model)
    with torch.no_grad():
        for name, parameter in trained(found[1]).items():
            parameter.copy_(trained(found[0])[name])
    for model in found:  # the prompt is longer than the texts
        model(input_ids=prompt(tokens=3), attention_mask=torch.ones(2, 3), labels=torch.tensor([0, 1])).loss.backward()
    local, remote = map(trained, found)
    assert len(local) == 2
    assert all(torch.equal(local[name].grad, parameter.grad) for name, parameter in remote.items())


def test_a_batch_travels_in_pieces_through_chains_of_two_hops(pair):
    config = ClientConfig(codec="raw", chain_tokens=18, micro_tokens=18)
    spans = ["0:2", "2:4", "0:2", "2:4"]
    with ThreadedSwarm(str(pair.directory), spans) as servers, Swarm(servers.address, config=config) as swarm:
        local, remote = with_lora(local_of(pair), remote_of(pair, swarm))
        target = remote.base_model.model.blocks.target
        shares = swarm.call(_share_out, swarm.core, target, Batch(torch.zeros(16, 9, 64)))
        for model in (local, remote):
            model(input_ids=prompt(rows=16), labels=prompt(rows=16)).loss.backward()
    chains = {share.chain for share in shares}  # by the speeds that their servers have measured, one may do
    assert sum(len(share.part.hidden_BTD) for share in shares) == 16
    assert len(shares) > len(chains)
    assert all(len(chain.hops) == 2 for chain in chains)
    theirs = trained(local)
    assert all(close(parameter.grad, theirs[name].grad) for name, parameter in trained(remote).items())


def test_deep_prompts_travel_when_they_have_changed_and_not_again(pair):
    made = []

    def transport(identity):
        made.append(CountingTransport(TlsTransport(identity, SwarmConfig())))
        return made[-1]

    with Swarm(pair.servers.address, config=pair.swarm.config, transport=transport) as swarm:
        model = peft.get_peft_model(
            remote_of(pair, swarm), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=64)
        )
        optimizer = torch.optim.SGD(trained(model).values(), lr=0.1)
        (count,) = made

        def run():
            before = count.sent_bytes
            loss = model(input_ids=prompt(), labels=prompt()).loss
            return loss, count.sent_bytes - before

        (_, first), (loss, second) = run(), run()
        loss.backward()
        optimizer.step()
        (_, third), (_, fourth) = run(), run()
    (prefix,) = trained(model).values()
    assert first - second >= prefix.nbytes
    assert third - fourth >= prefix.nbytes
    assert max(second, fourth) < prefix.nbytes / 4


def test_a_soft_prompt_that_leaves_no_room_is_refused(pair):
    for kind in (peft.PromptTuningConfig, peft.PrefixTuningConfig):
        model = peft.get_peft_model(remote_of(pair), kind(task_type="CAUSAL_LM", num_virtual_tokens=300))
        with pytest.raises(ContextTooLong, match="256"):
            model(input_ids=prompt(), labels=prompt())


def test_a_client_that_vanishes_between_forward_and_backward_leaves_nothing(pair):
    with ThreadedSwarm(str(pair.directory), ["0:4"]) as servers:
        (server,) = servers.servers
        with Swarm(servers.address, config=ClientConfig(codec="raw")) as swarm:
            (model,) = with_lora(remote_of(pair, swarm))
            model(input_ids=prompt(), labels=prompt())  # and never back
        handler = server.server._handler
        assert handler.adapters.used_bytes > 0  # until others need the room
        assert all(kept.uses == 0 for kept in handler.adapters._kept.values())
        assert handler._served[0].load.waiting == 0
        with Swarm(servers.address, config=ClientConfig(codec="raw")) as swarm:
            local, remote = with_lora(local_of(pair), remote_of(pair, swarm))
            for one in (local, remote):
                one(input_ids=prompt(), labels=prompt()).loss.backward()
    theirs = trained(local)
    assert all(torch.equal(parameter.grad, theirs[name].grad) for name, parameter in trained(remote).items())


def test_a_gradient_that_is_none_is_named_with_its_block(pair, tmp_path):
    (model,) = with_lora(remote_of(pair))
    training = Training(model, torch.optim.SGD(trained(model).values(), lr=1.0), tmp_path)
    logits_BTV = model(input_ids=prompt()).logits
    loss = (logits_BTV - logits_BTV.detach()).sqrt().sum()  # 0, and infinitely steep
    before = {name: parameter.clone() for name, parameter in trained(model).items()}
    with pytest.raises(Diverged, match=r"layers\.3\.self_attn\..* of block 3 has .* nan or infinite"):
        training.update(loss)
    assert all(torch.equal(parameter, before[name]) for name, parameter in trained(model).items())

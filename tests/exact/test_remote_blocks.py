"""``model.blocks`` and the heads on top of them: values and gradients are those of the whole model in one piece."""

# B batch, T tokens, D model width

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy

from corolla.client import AutoModelForCausalLM, AutoModelForSequenceClassification, ClientConfig, Swarm
from corolla.errors import UsageError
from corolla.testing import ThreadedSwarm

FAMILIES = ["llama", "gemma3_text", "bloom", "qwen3_moe"]
TOLERANCE = 2e-5  # of the largest number: batches of another size add in another order


@pytest.fixture(params=FAMILIES)
def pair(request, pairs):
    return pairs[request.param]


@pytest.fixture
def llama(pairs):
    return pairs["llama"]


def prompt(rows=2, tokens=9):
    return torch.randint(3, 98, (rows, tokens), generator=torch.Generator().manual_seed(1))


def ragged():
    mask_BT = torch.ones(2, 9, dtype=torch.long)
    mask_BT[1, :4] = 0
    return prompt(), mask_BT


def close(actual, expected):
    return bool((actual - expected).abs().max() <= TOLERANCE * expected.abs().max())


@torch.no_grad()
@pytest.mark.parametrize(("start", "stop"), [(0, 3), (1, 2), (2, 3), (0, 1)])
def test_a_range_of_blocks_turns_its_input_into_its_output(pair, start, stop):
    states = pair.local(prompt(), output_hidden_states=True).hidden_states
    assert torch.equal(pair.remote.blocks[start:stop](states[start]), states[stop])


@torch.no_grad()
def test_slices_chain_and_single_blocks_iterate(pair):
    hidden_BTD = pair.local(prompt(), output_hidden_states=True).hidden_states[0]
    whole_BTD = pair.remote.blocks(hidden_BTD)
    assert torch.equal(pair.remote.blocks[2:](pair.remote.blocks[:2](hidden_BTD)), whole_BTD)
    for block in pair.remote.blocks[:-1]:
        hidden_BTD = block(hidden_BTD)
    assert torch.equal(pair.remote.blocks[-1](hidden_BTD), whole_BTD)


def gradients(model, mask_BT=None, **options):
    """The loss of a model on its own prompt, and the gradients of the embeddings that went in."""
    ids_BT = prompt()
    embeddings_BTD = model.get_input_embeddings()(ids_BT).detach().requires_grad_()
    outputs = model(inputs_embeds=embeddings_BTD, attention_mask=mask_BT, use_cache=False, **options)
    loss = cross_entropy(outputs.logits[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())
    if outputs.hidden_states is not None:
        loss = loss + outputs.hidden_states[2].square().mean() + outputs.hidden_states[3].mean()
    loss.backward()
    return loss.detach(), embeddings_BTD.grad


def test_gradients_of_the_input_are_equal(pair):
    actual, expected = gradients(pair.remote), gradients(pair.local)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(actual, expected, strict=True))


def test_gradients_through_hidden_states_are_close(pair):
    # A block's input gets gradients from three places, which are added in another order.
    actual, expected = (gradients(model, output_hidden_states=True) for model in (pair.remote, pair.local))
    assert all(close(mine, theirs) for mine, theirs in zip(actual, expected, strict=True))


def test_gradients_of_a_padded_batch_are_equal(pair):
    _, mask_BT = ragged()
    positions_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
    extra = {} if pair.local.config.model_type == "bloom" else {"position_ids": positions_BT}
    for mine, theirs in zip(
        gradients(pair.remote, mask_BT, **extra), gradients(pair.local, mask_BT, **extra), strict=True
    ):
        assert torch.equal(mine, theirs)


def test_gradients_of_gradients_are_refused(llama):
    hidden_BTD = torch.randn(1, 3, 64, requires_grad=True)
    (grad_BTD,) = torch.autograd.grad(llama.remote.blocks(hidden_BTD).square().sum(), hidden_BTD, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad_BTD.sum().backward()


def test_a_batch_is_cut_into_requests_of_bounded_size(llama):
    config = ClientConfig(codec="raw", batch_tokens=10)  # 9 tokens a row: a request for each
    expected = gradients(llama.local)
    with Swarm(llama.servers.address, config=config) as swarm:
        model = AutoModelForCausalLM.from_pretrained(str(llama.directory), swarm=swarm)
        assert all(close(mine, theirs) for mine, theirs in zip(gradients(model), expected, strict=True))


def test_a_backward_pass_survives_the_server_of_the_forward_pass(llama):
    config = ClientConfig(codec="raw")
    with (
        ThreadedSwarm(str(llama.directory), ["0:3", "2:4", "0:4"]) as servers,
        Swarm(servers.address, config=config) as swarm,
    ):
        model = AutoModelForCausalLM.from_pretrained(str(llama.directory), swarm=swarm)
        hidden_BTD = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(2))
        results = []
        for leaves in (False, True):
            input_BTD = hidden_BTD.clone().requires_grad_()
            output_BTD = model.blocks(input_BTD)
            if leaves:
                servers.servers[2].stop()
            output_BTD.square().sum().backward()
            results.append(input_BTD.grad)
    assert torch.equal(*results)


@pytest.mark.parametrize("family", ["llama", "bloom", "gpt2"])
def test_a_classifier_trains_its_head(family, pairs):
    pair = pairs[family]
    ids_BT, mask_BT = prompt(), torch.ones(2, 9, dtype=torch.long)
    ids_BT[1, 6:], mask_BT[1, 6:] = 0, 0
    torch.manual_seed(0)
    remote = AutoModelForSequenceClassification.from_pretrained(str(pair.directory), swarm=pair.swarm)
    local = transformers.AutoModelForSequenceClassification.from_pretrained(pair.directory, dtype=torch.float32).eval()
    local.score.load_state_dict(remote.score.state_dict())
    labels_B = torch.tensor([0, 1])
    results = []
    for model in (remote, local):
        model.config.pad_token_id = 0
        embeddings = model.get_input_embeddings().weight
        outputs = model(ids_BT, attention_mask=mask_BT, labels=labels_B)
        outputs.loss.backward()
        results.append((outputs.logits.detach(), model.score.weight.grad, embeddings.grad))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.zeros(9, 64),), r"\[batch, tokens, width\], not a tensor of shape \[9, 64\]"),
        ((torch.zeros(0, 9, 64),), r"nothing to run: a tensor of shape \[0, 9, 64\]"),
        ((torch.zeros(2, 9, 32),), "the last of 64 values"),
        ((torch.zeros(2, 9, 64), torch.ones(2, 8)), r"attention_mask has shape \[2, 8\]; the input has 2 rows of 9"),
    ],
)
def test_what_does_not_fit_is_refused_with_both_shapes(llama, arguments, words):
    with pytest.raises(UsageError, match=words):
        llama.remote.blocks(*arguments)


@pytest.mark.parametrize("index", [slice(2, 2), slice(0, 4, 2), slice(9, 12)])
def test_what_is_no_range_of_blocks_is_refused(llama, index):
    with pytest.raises(UsageError, match="not a range of one or more blocks in order"):
        llama.remote.blocks[index]

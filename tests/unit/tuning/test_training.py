"""A training that is interrupted goes on bit for bit, and learns nothing from what is no number."""

import pytest
import torch
from torch import nn

from corolla.errors import Diverged, UsageError
from corolla.tuning import Training, check_gradients

STEPS = 7


class Interrupted(Exception):
    pass


def made(optimizer=torch.optim.AdamW):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    model[0].bias.requires_grad_(False)
    return model, optimizer([one for one in model.parameters() if one.requires_grad], lr=0.1)


def loss_of(model, step):
    inputs = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
    return (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()


def run(directory, *, until=STEPS, dies_at=None, **options):
    model, optimizer = made(**options)
    training = Training(model, optimizer, directory, every_steps=2)
    for step in training.steps(until):
        if step == dies_at:
            raise Interrupted
        training.update(loss_of(model, step))
    return model.state_dict(), training.losses


def same(one, other):
    return one[1] == other[1] and all(torch.equal(tensor, other[0][name]) for name, tensor in one[0].items())


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
@pytest.mark.parametrize("dies_at", [0, 1, 3, 6])
def test_what_dies_between_checkpoints_goes_on_as_if_it_had_not(tmp_path, optimizer, dies_at):
    whole = run(tmp_path / "whole", optimizer=optimizer)
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", dies_at=dies_at, optimizer=optimizer)
    assert same(run(tmp_path / "parts", optimizer=optimizer), whole)
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["checkpoint.safetensors"]


def test_a_training_may_end_early_and_be_longer_later(tmp_path):
    run(tmp_path / "parts", until=3)
    assert same(run(tmp_path / "parts"), run(tmp_path / "whole"))
    assert same(run(tmp_path / "parts"), run(tmp_path / "whole"))  # nothing is left to do


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_nothing_is_learned_from_a_loss_that_is_none(tmp_path, number):
    model, optimizer = made()
    training = Training(model, optimizer, tmp_path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(Diverged, match=f"the loss of step 0 is {number}"):
        training.update(model(torch.ones(1, 4)).sum() * number)
    assert same((model.state_dict(), []), (before, training.losses))


def test_a_gradient_that_is_none_is_named_with_its_block():
    model = nn.Module()
    model.layers = nn.ModuleList(nn.ModuleDict({"lora_A": nn.Linear(2, 2, bias=False)}) for _ in range(3))
    for index, bad in ((0, 4), (1, 2), (2, 0)):
        grad = torch.ones(2, 2)
        grad.view(-1)[:bad] = float("nan")
        model.layers[index]["lora_A"].weight.grad = grad
    with pytest.raises(Diverged, match=r"layers\.1\.lora_A\.weight of block 1 has 2 numbers .* the first of 2"):
        check_gradients(model)


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    run(tmp_path, until=2)
    other = nn.Linear(4, 1)
    with pytest.raises(UsageError, match="of a training of something else: it does not fit 0.weight"):
        Training(other, torch.optim.AdamW(other.parameters()), tmp_path)
    (tmp_path / "checkpoint.safetensors").write_bytes(b"{}")
    with pytest.raises(UsageError, match="is no checkpoint of a training"):
        run(tmp_path)


def test_a_loop_that_forgets_to_learn_is_told(tmp_path):
    model, optimizer = made()
    with pytest.raises(UsageError, match="step 0 did not end with update"):
        list(Training(model, optimizer, tmp_path).steps(2))
    model.requires_grad_(False)
    with pytest.raises(UsageError, match="nothing in the model trains"):
        Training(model, optimizer, tmp_path)

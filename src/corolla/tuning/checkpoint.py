"""Where a training stands, in one file of safetensors: what trains, the optimiser's state, the dice, the losses so far.

A file is there whole or not at all. Knows nothing of swarms.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from corolla.errors import UsageError

__all__ = ["load_checkpoint", "save_checkpoint"]

_DICE = "torch/dice"


def save_checkpoint(path: Path, model: nn.Module, optimizer: Optimizer, losses: Sequence[float]) -> None:
    """Write down where a training stands.

    Args:
        path: The file; what is there is replaced at once, or stays if writing fails.
        model: Of which all parameters that train are written.
        optimizer: Of these parameters.
        losses: Of the steps that were made.
    """
    trained = _trained(model)
    tensors: dict[str, Tensor] = {f"parameters/{name}": parameter for name, parameter in trained.items()}
    numbers: dict[str, Any] = {}
    for name, parameter in trained.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{key}/{name}"] = value
            else:
                numbers[f"optimizer/{key}/{name}"] = value
    tensors[_DICE] = torch.get_rng_state()
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    save_file(
        {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()},
        unfinished,
        {"losses": json.dumps([*losses]), "numbers": json.dumps(numbers)},
    )
    os.replace(unfinished, path)


def load_checkpoint(path: Path, model: nn.Module, optimizer: Optimizer) -> list[float]:
    """Bring a training to where a file says that it stood, bit for bit.

    Args:
        path: The file.
        model: What is trained, made as it was made then.
        optimizer: Made as it was made then; its settings are not in the file.

    Returns:
        The losses of the steps that were made.

    Raises:
        UsageError: If the file is none, or of a training of something else.
    """
    trained = _trained(model)
    try:
        with safe_open(path, "pt") as file:
            said = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it cannot be iterated
        losses, numbers = json.loads(said["losses"]), json.loads(said["numbers"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UsageError(f"{path} is no checkpoint of a training: {error}; delete it to begin again") from error
    found = {name.removeprefix("parameters/"): tensor for name, tensor in tensors.items() if name[:11] == "parameters/"}
    expected = {name: tuple(parameter.shape) for name, parameter in trained.items()}
    if {name: tuple(tensor.shape) for name, tensor in found.items()} != expected:
        others = sorted(found.keys() ^ trained.keys()) or sorted(expected)
        raise UsageError(
            f"{path} is of a training of something else: it does not fit {others[0]}; choose another directory"
        )
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(found[name])
    for name, value in (tensors | numbers).items():
        if name.startswith("optimizer/"):
            _, key, owner = name.split("/", 2)
            optimizer.state[trained[owner]][key] = value
    torch.set_rng_state(tensors[_DICE])
    return [float(loss) for loss in losses]


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

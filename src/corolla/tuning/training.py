"""A plain training loop that may be interrupted at any moment and then goes on as if it had not been."""

import math
import re
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor, nn
from torch.optim import Optimizer

from corolla.errors import Diverged, UsageError
from corolla.tuning.checkpoint import load_checkpoint, save_checkpoint

__all__ = ["Training", "check_gradients"]


class Training:
    """Steps of a training, with a checkpoint in a directory, from which another run goes on, bit for bit.

    ::

        training = Training(model, optimizer, Path("run"))
        for step in training.steps(200):
            training.update(model(**batches[step]).loss)

    What a step computes must follow from its number alone, and from torch's dice; these are in the checkpoint.

    Args:
        model: What is trained; what does not train is not looked at.
        optimizer: Of its parameters that train.
        directory: Where the checkpoint is, or will be.
        every_steps: After how many steps it is written; also after the last one of :meth:`steps`.

    Attributes:
        losses: Of all steps so far, those of earlier runs as well.

    Raises:
        UsageError: If nothing trains, or the checkpoint is of a training of something else.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, directory: Path, *, every_steps: int = 20) -> None:
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise UsageError("nothing in the model trains; put an adapter on it, or let some parameters need gradients")
        self.losses: list[float] = []
        self._model = model
        self._optimizer = optimizer
        self._path = Path(directory) / "checkpoint.safetensors"
        self._every_steps = every_steps
        if self._path.exists():
            self.losses = load_checkpoint(self._path, model, optimizer)

    @property
    def step(self) -> int:
        """How many steps were made."""
        return len(self.losses)

    def steps(self, until: int) -> Iterator[int]:
        """Give the numbers of the steps that are left, beginning where the checkpoint ended.

        Args:
            until: After how many steps in all to end.

        Raises:
            UsageError: If :meth:`update` was not called for a step.
        """
        saved = self.step
        while (step := self.step) < until:
            yield step
            if self.step != step + 1:
                raise UsageError(f"step {step} did not end with update(loss); call it once a step")
            if self.step % self._every_steps == 0:
                self.save()
                saved = self.step
        if saved != self.step:
            self.save()

    def update(self, loss: Tensor) -> float:
        """Learn from a loss.

        Args:
            loss: Of this step; one number, differentiable.

        Returns:
            It.

        Raises:
            Diverged: If it, or a gradient, is nan or infinite; what trains is left as it was before the step.
            NoChain: If some blocks have no server for the way back.
            PeerError: If servers kept failing.
        """
        value = float(loss.detach())
        if not math.isfinite(value):
            raise Diverged(
                f"the loss of step {self.step} is {value}; look at the batch, or go back to a checkpoint and learn "
                "more slowly"
            )
        self._optimizer.zero_grad()
        loss.backward()
        check_gradients(self._model)
        self._optimizer.step()
        self.losses.append(value)
        return value

    def save(self) -> None:
        """Write the checkpoint now."""
        save_checkpoint(self._path, self._model, self._optimizer, self.losses)


def check_gradients(model: nn.Module) -> None:
    """Check that all gradients are numbers. Whoever scales a loss does so after having taken the scale off again.

    Args:
        model: Whose parameters' gradients.

    Raises:
        Diverged: If some are not; names the first on the way back, which is that of the last block, and how many.
    """
    wrong = {
        name: int((~parameter.grad.isfinite()).sum())
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not bool(parameter.grad.isfinite().all())
    }
    if not wrong:
        return
    first = max(wrong, key=lambda name: _block_of(name) or -1)
    block = _block_of(first)
    where = "" if block is None else f" of block {block}"
    raise Diverged(
        f"the gradient of {first}{where} has {wrong[first]} numbers that are nan or infinite, the first of "
        f"{len(wrong)} on the way back; learn more slowly, or cut the gradients' norm"
    )


def _block_of(name: str) -> int | None:
    """Read a block's index off the name of what an adapter has put beside one of its layers."""
    found = re.search(r"\.(\d+)\.(?=.*lora_)", name)
    return int(found[1]) if found else None

"""How much of what blocks compute on the way forward is kept for the way back; the rest is computed again.

What a block keeps is counted as it runs, since families differ, and kernels do. Knows no blocks.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

__all__ = ["GraphBudget"]


class GraphBudget:
    """Runs blocks one after the other, and lets them keep what they compute for as long as there is room.

    Args:
        limit_bytes: How much all of them together may keep; 0 for nothing but their inputs.
        weights: What is there anyway, and so is not counted.
    """

    def __init__(self, limit_bytes: int, weights: Iterable[Tensor]) -> None:
        self._left_bytes = limit_bytes
        self._seen = {weight.untyped_storage().data_ptr() for weight in weights} if limit_bytes else set()
        self._block_bytes = 0

    def run(self, block: nn.Module, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the next block; it keeps what it computes if there is room for as much as the last one kept.

        Args:
            block: The block.
            hidden: Its input.
            *args: What else it takes.
            **kwargs: Likewise.
        """
        if self._left_bytes <= 0 or self._left_bytes < self._block_bytes:
            return checkpoint(block, hidden, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
        before_bytes = self._left_bytes
        with saved_tensors_hooks(self._count, _same):
            output = block(hidden, *args, **kwargs)
        self._block_bytes = before_bytes - self._left_bytes
        return output

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:  # what is kept stays, so nothing else comes to lie there
            self._seen.add(storage.data_ptr())
            self._left_bytes -= storage.nbytes()
        return tensor


def _same(tensor: Tensor) -> Tensor:
    return tensor

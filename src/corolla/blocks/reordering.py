"""The order in which bitsandbytes' kernel for CPUs wants numbers of four bits; ``machine/products.py`` reads it."""

from typing import Final

import torch
from torch import Tensor

__all__ = ["KERNEL_ROWS", "reorder", "undo_reorder"]

KERNEL_ROWS: Final = 32
"""The output rows that the kernel takes at once."""


def reorder(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Bring four-bit numbers, two a byte, into the order of bitsandbytes' CPU kernel.

    In that order, 32 rows go together; of two neighbouring numbers of all 32, one byte holds a number of one of the
    first 16 rows in its low half, and the number in the same place of the last 16 in its high half.
    """
    outputs, inputs = shape
    numbers = torch.stack([packed.view(-1) >> 4, packed.view(-1) & 0xF], -1)
    rows = numbers.view(outputs // KERNEL_ROWS, KERNEL_ROWS, inputs // 2, 2).transpose(1, 2)
    halves = rows.reshape(outputs // KERNEL_ROWS, inputs // 2, 2, KERNEL_ROWS)
    return (halves[:, :, 0] | halves[:, :, 1] << 4).view(outputs, inputs // 2)


def undo_reorder(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Undo :func:`reorder`."""
    outputs, inputs = shape
    bytes_ = packed.view(outputs // KERNEL_ROWS, inputs // 2, KERNEL_ROWS)
    rows = torch.stack([bytes_ & 0xF, bytes_ >> 4], 2).view(outputs // KERNEL_ROWS, inputs // 2, KERNEL_ROWS, 2)
    numbers = rows.transpose(1, 2).reshape(-1, 2)
    return (numbers[:, :1] << 4) | numbers[:, 1:]

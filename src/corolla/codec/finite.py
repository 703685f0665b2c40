"""Whether tensors hold nothing but numbers. Every tensor of a step is looked at, on each side of its way."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["all_finite", "count_not_finite"]


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Say whether no number is nan or infinite.

    A nan or an infinity makes the sum one, and a sum is had in half the time; only if the sum is none, which large
    numbers may bring about as well, are the numbers looked at one by one.
    """
    return all(
        math.isfinite(tensor.sum(dtype=torch.float32).item()) or bool(tensor.isfinite().all()) for tensor in tensors
    )


def count_not_finite(tensors: Sequence[Tensor]) -> int:
    """Count the numbers that are nan or infinite."""
    return sum(int((~tensor.isfinite()).sum()) for tensor in tensors)

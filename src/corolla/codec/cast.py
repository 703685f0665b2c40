"""Payloads of plain numbers: the tensor's own, or the nearest ones of two bytes. Must not know names on the wire."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from corolla.codec.memory import as_tensor, narrow
from corolla.wire import Buffer

__all__ = ["Cast"]


@dataclass(frozen=True)
class Cast:
    """The tensor's numbers, row-major and little-endian, each rounded to the nearest of one format.

    Finite numbers beyond the format's largest become its largest: one infinite activation would turn everything after
    it into nan, a clipped one does not. Nan stays nan, infinities stay what they are.

    Args:
        dtype: The format; ``None`` keeps the tensor's own, bit by bit.
    """

    dtype: torch.dtype | None

    def packed_bytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """Say how many bytes a tensor of this shape and format packs into."""
        return math.prod(shape) * (self.dtype or dtype).itemsize

    def row_parts(self, width: int, dtype: torch.dtype) -> tuple[tuple[int, int], ...]:
        """For each part of a payload: the bytes of one row in it, and those of one row in the parts before it."""
        return (((self.dtype or dtype).itemsize * width, 0),)

    def pack(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Turn a tensor into the parts of its payload; no copy if it has the format already."""
        return (narrow(tensor, self.dtype or tensor.dtype),)

    def unpack(self, payload: Buffer, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Turn a payload of the right size back; no copy if it is aligned and has the format already."""
        return narrow(as_tensor(payload, self.dtype or dtype).view(shape), dtype)

    def bound(self, tensor: Tensor) -> Tensor:
        """State the largest error for each number, in float64.

        ``max(u |x|, t / 2, |x| - m)`` where the format rounds by at most ``u`` (bfloat16: 2^-9, float16: 2^-11), has
        ``t`` as its smallest positive number (2^-133; 2^-24) and ``m`` as its largest (3.39e38; 65504). Zero if the
        tensor has the format already, and for numbers that are not finite, since they survive.
        """
        if self.dtype is None or self.dtype == tensor.dtype:
            return torch.zeros(tensor.shape, dtype=torch.float64)
        info = torch.finfo(self.dtype)
        magnitude = tensor.double().abs()
        rounding = (magnitude * info.eps / 2).clamp_min(info.tiny * info.eps / 2)
        error = torch.maximum(rounding, magnitude - info.max)
        return torch.where(magnitude.isfinite(), error, 0.0)

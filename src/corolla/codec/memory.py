"""Tensors as memory: which formats travel, and views of bytes as tensors. Must not know what a codec makes of them."""

import ctypes
from typing import Final

import torch
from torch import Tensor

from corolla.terms import DType
from corolla.wire import Buffer

__all__ = ["DTYPES", "NAMES", "as_bytes", "as_tensor", "narrow"]

DTYPES: Final[dict[DType, torch.dtype]] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""The number formats of :data:`corolla.terms.DType` as torch names them."""

NAMES: Final[dict[torch.dtype, DType]] = {dtype: name for name, dtype in DTYPES.items()}
"""And the other way round."""


_COPIED_BYTES: Final = 1 << 14
"""So few bytes are copied sooner than torch is asked for a view of them: beside a step of computing, none of torch's
code is in the processor's caches, and each of its operations takes 30 us."""


def as_bytes(tensor: Tensor) -> memoryview:
    """View a contiguous CPU tensor's memory as read-only bytes, in the host's byte order; a small one is copied."""
    if tensor.nbytes <= _COPIED_BYTES:
        return memoryview(ctypes.string_at(tensor.data_ptr(), tensor.nbytes))
    return tensor.reshape(-1).view(torch.uint8).numpy().data.toreadonly()


def as_tensor(payload: Buffer, dtype: torch.dtype = torch.uint8) -> Tensor:
    """View bytes as a flat tensor of at least one number; copies if they are read-only, or not aligned to numbers."""
    view = memoryview(payload)
    tensor = torch.frombuffer(bytearray(view) if view.readonly else view, dtype=dtype)
    return tensor if tensor.data_ptr() % dtype.itemsize == 0 else tensor.clone()


def narrow(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to the nearest number of ``dtype``; finite numbers beyond its largest become its largest, not infinite."""
    if tensor.dtype == dtype:
        return tensor
    limit = torch.finfo(dtype).max
    if limit >= torch.finfo(tensor.dtype).max or tensor.abs().amax().item() <= limit:  # false if there is a nan
        return tensor.to(dtype)
    wide = tensor.float()  # a bfloat16 cannot be clamped to 65504
    return torch.where(wide.isinf(), wide, wide.clamp(-limit, limit)).to(dtype)

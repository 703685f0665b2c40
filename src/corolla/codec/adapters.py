"""Adapters to bytes and back: float32 as it is, since what is named by its hash must be the same on both sides.

Knows shapes and numbers; not what they are added to.
"""

# R ranks, I inputs, O outputs, K key heads, P tokens of a prefix, W head width

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from corolla.codec.finite import all_finite
from corolla.codec.memory import as_bytes, as_tensor
from corolla.errors import CodecError, UsageError
from corolla.wire import AdapterMeta, Buffer, PairMeta, PrefixMeta, hash_adapter

__all__ = ["AdapterParts", "EncodedAdapter", "decode_adapter", "encode_adapter", "join_numbers", "split_numbers"]

Pair = tuple[str, Tensor, Tensor, float]
"""A layer's name, ``down_RI``, ``up_OR``, and the scaling."""


class AdapterParts(NamedTuple):
    """What is added to one block.

    Args:
        pairs: To its layers.
        prefix: ``key_KPW`` and ``value_KPW``; ``None`` for none.
    """

    pairs: Sequence[Pair]
    prefix: tuple[Tensor, Tensor] | None


class EncodedAdapter(NamedTuple):
    """What is added to one block, ready to be sent.

    Args:
        meta: How to read the bytes.
        buffers: The bytes. They may be the memory of the tensors.
        hash: What it is called.
    """

    meta: AdapterMeta
    buffers: tuple[memoryview, ...]
    hash: bytes


def encode_adapter(parts: AdapterParts) -> EncodedAdapter:
    """Turn what is added to one block into bytes.

    Args:
        parts: It, in any floating format, on any device.

    Raises:
        UsageError: If a tensor is empty, or has another number of axes than it should.
    """
    tensors = [tensor for _, down_RI, up_OR, _ in parts.pairs for tensor in (down_RI, up_OR)]
    if any(tensor.dim() != 2 or not tensor.numel() for tensor in tensors):
        raise UsageError(f"pairs of shapes {[list(tensor.shape) for tensor in tensors]} cannot be sent")
    if parts.prefix is not None:
        tensors += parts.prefix
        if any(tensor.dim() != 3 or not tensor.numel() for tensor in parts.prefix):
            raise UsageError(f"a prefix of shapes {[list(tensor.shape) for tensor in parts.prefix]} cannot be sent")
    prefix = None
    if parts.prefix is not None:
        heads, tokens, key_width = parts.prefix[0].shape
        prefix = PrefixMeta(heads, tokens, key_width, parts.prefix[1].shape[2])
    meta = AdapterMeta(
        pairs=tuple(
            PairMeta(name, down_RI.shape[0], down_RI.shape[1], up_OR.shape[0], scaling)
            for name, down_RI, up_OR, scaling in parts.pairs
        ),
        prefix=prefix,
    )
    buffers = tuple(as_bytes(tensor.detach().to("cpu", torch.float32).contiguous()) for tensor in tensors)
    return EncodedAdapter(meta, buffers, hash_adapter(meta, buffers))


def decode_adapter(meta: AdapterMeta, payload: Buffer) -> AdapterParts:
    """Turn bytes from anywhere back into what is added to one block.

    Args:
        meta: How to read them.
        payload: The bytes. They are copied, since an adapter may be kept for longer than all that came with it.

    Raises:
        CodecError: If there are more or fewer than described.
        UsageError: If some numbers are none.
    """
    if memoryview(payload).nbytes != meta.nbytes:
        raise CodecError(f"an adapter takes {meta.nbytes} bytes, but {memoryview(payload).nbytes} came")
    numbers_F = as_tensor(bytes(payload)).view(torch.float32)
    if not all_finite([numbers_F]) or not all(math.isfinite(one.scaling) for one in meta.pairs):
        raise UsageError("the adapter holds numbers that are infinite or none at all; has its training diverged?")
    tensors = iter(split_numbers(numbers_F, meta.shapes))
    pairs = [(one.name, next(tensors), next(tensors), one.scaling) for one in meta.pairs]
    return AdapterParts(pairs, None if meta.prefix is None else (next(tensors), next(tensors)))


def join_numbers(tensors: Sequence[Tensor]) -> Tensor:
    """Put the numbers of several tensors in a row, in float32."""
    return torch.cat([tensor.detach().reshape(-1).float() for tensor in tensors])


def split_numbers(numbers_F: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Undo :func:`join_numbers`.

    Args:
        numbers_F: The numbers, as many as the shapes have together.
        shapes: The shapes of the tensors.
    """
    pieces = numbers_F.split([math.prod(shape) for shape in shapes])
    return [piece.view(*shape) for piece, shape in zip(pieces, shapes, strict=True)]

"""The codecs by name, and what all of them check. Must not know who sends a payload, when, or why.

=======  =================================  =====================================================
name     bytes a number                     error
=======  =================================  =====================================================
raw      the tensor's own, 4 or 2           none
fp16     2                                  2^-11 of the number; beyond 65504, all that is over it
bf16     2                                  2^-9 of the number
int8     1 + 1/32                           at most 0.8 % of the largest of 64 neighbours
=======  =================================  =====================================================

A sender may also ask for ``half``: fp16 or bf16, for each tensor the one that serves it better.

Payloads are little-endian. ``docs/codecs.md`` says when to use which.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from corolla.codec.blockwise import Blockwise
from corolla.codec.cast import Cast
from corolla.codec.memory import DTYPES, NAMES, as_bytes
from corolla.errors import CodecError, UsageError
from corolla.wire import Buffer, TensorMeta

__all__ = [
    "CODECS",
    "PREFERENCES",
    "Codec",
    "Encoded",
    "check_preference",
    "codec_named",
    "decode",
    "encode",
    "splice",
    "wire_bytes",
]

_MAX_AXES: Final = 4


@dataclass(frozen=True)
class Encoded:
    """A tensor ready to be sent.

    Args:
        meta: How to read the bytes.
        buffers: The bytes, in order, read-only. They may be the memory of the tensor that was encoded: leave it
            unwritten for as long as they are in use.
    """

    meta: TensorMeta
    buffers: tuple[memoryview, ...]


@dataclass(frozen=True)
class Codec:
    """A reversible rule between tensors and payload bytes with a stated error; get one from :func:`codec_named`.

    Args:
        name: What it is called on the wire.
        layout: How its payloads are laid out.
    """

    name: str
    layout: Cast | Blockwise

    def encode(self, tensor: Tensor) -> Encoded:
        """Turn a tensor into bytes; it is read, never written to, and no gradient flows.

        Args:
            tensor: Float32, bfloat16 or float16, one to four axes, not empty, contiguous or not, on any device.

        Returns:
            The bytes and their description.

        Raises:
            UsageError: If the tensor is empty, or has another format or number of axes.
        """
        name = NAMES.get(tensor.dtype)
        shape = tuple(tensor.shape)
        if name is None or not 1 <= len(shape) <= _MAX_AXES or 0 in shape:
            raise UsageError(
                f"cannot encode a tensor of {tensor.dtype} and shape {shape}: it must have one of the formats "
                f"{', '.join(DTYPES)}, one to {_MAX_AXES} axes, and no empty axis"
            )
        if tensor.requires_grad or not tensor.is_cpu or not tensor.is_contiguous():
            tensor = tensor.detach().cpu().contiguous()
        parts = self.layout.pack(tensor)
        buffers = tuple(as_bytes(part) for part in parts)
        nbytes = sum(buffer.nbytes for buffer in buffers)
        return Encoded(TensorMeta(codec=self.name, dtype=name, shape=shape, nbytes=nbytes), buffers)

    def decode(self, meta: TensorMeta, payload: Buffer) -> Tensor:
        """Turn bytes from anywhere back into a tensor.

        A payload that may be written to is taken over: the tensor may share its memory, so nobody may write to it
        afterwards (a received frame's payload is such memory). One that is read-only is copied.

        Args:
            meta: How to read the bytes.
            payload: All buffers of the encoded tensor in one.

        Returns:
            A CPU tensor of the described format and shape.

        Raises:
            CodecError: If the bytes and their description do not fit together, or are not what this codec writes.
        """
        dtype = DTYPES.get(meta.dtype)
        if meta.codec != self.name or dtype is None:
            raise CodecError(
                f"codec {self.name} was given a payload of codec {meta.codec!r} and format {meta.dtype!r}; it reads "
                f"its own, of {', '.join(DTYPES)}"
            )
        if not 1 <= len(meta.shape) <= _MAX_AXES or min(meta.shape) < 1:
            raise CodecError(
                f"a tensor of shape {meta.shape} cannot travel: it needs one to {_MAX_AXES} axes, none empty"
            )
        expected_bytes = self.layout.packed_bytes(meta.shape, dtype)
        received_bytes = memoryview(payload).nbytes
        if not received_bytes == meta.nbytes == expected_bytes:
            raise CodecError(
                f"a tensor of {meta.dtype} and shape {meta.shape} takes {expected_bytes} bytes with codec {self.name}; "
                f"{meta.nbytes} were described and {received_bytes} received"
            )
        return self.layout.unpack(payload, meta.shape, dtype)

    def bound(self, tensor: Tensor) -> Tensor:
        """State how far each number may be from what comes out after :meth:`encode` and :meth:`decode`.

        The formula is in the docstring of the layout's ``bound``. Nan and the infinities always survive: theirs is 0.

        Args:
            tensor: What would be encoded.

        Returns:
            A float64 CPU tensor of the same shape.
        """
        return self.layout.bound(tensor.detach().cpu())

    def bits_per_value(self, tensor: Tensor) -> float:
        """Say how many bits one number of such a tensor costs on the wire, scales included."""
        return 8 * self.layout.packed_bytes(tuple(tensor.shape), tensor.dtype) / math.prod(tensor.shape)


_CODECS: Final = {
    codec.name: codec
    for codec in (
        Codec("raw", Cast(None)),
        Codec("fp16", Cast(torch.float16)),
        Codec("bf16", Cast(torch.bfloat16)),
        Codec("int8", Blockwise()),
    )
}

CODECS: Final = tuple(_CODECS)
"""The names of all codecs, most exact first."""

PREFERENCES: Final = ("raw", "half", "fp16", "bf16", "int8")
"""What a sender may be asked for."""

_HALF_SMALLEST: Final = 2.0**-4
_HALF_LARGEST: Final = 65504.0


def codec_named(name: str) -> Codec:
    """Find a codec.

    Args:
        name: One of :data:`CODECS`.

    Raises:
        CodecError: If there is none of that name.
        UsageError: If this machine stores numbers big-endian, in which case no codec works on it.
    """
    if sys.byteorder != "little":
        raise UsageError("payloads are little-endian and this machine is big-endian, which Corolla does not support")
    if (codec := _CODECS.get(name)) is not None:
        return codec
    raise CodecError(f"there is no codec {name!r}; this version knows {', '.join(CODECS)}")


def encode(tensor: Tensor, preference: str) -> Encoded:
    """Turn a tensor into bytes as its receiver prefers.

    ``half`` is fp16, which rounds eight times finer than bf16, as long as the largest number of a float32 tensor is
    neither too large for it nor below 2^-4; below 2^-14 the steps of fp16 no longer shrink, which does no harm
    beside a number that large. Gradients are often smaller throughout, and then travel as bf16.

    Args:
        tensor: As for :meth:`Codec.encode`.
        preference: One of :data:`PREFERENCES`.

    Returns:
        The bytes and their description, which names the codec that was used.

    Raises:
        CodecError: If there is no such preference.
        UsageError: If the tensor cannot be encoded.
    """
    check_preference(preference)
    if preference != "half":
        return codec_named(preference).encode(tensor)
    if tensor.dtype != torch.float32 or not tensor.numel():
        return codec_named("bf16" if tensor.dtype == torch.bfloat16 else "fp16").encode(tensor)
    largest = tensor.detach().abs().amax().item()
    return codec_named("fp16" if _HALF_SMALLEST <= largest <= _HALF_LARGEST else "bf16").encode(tensor)


def wire_bytes(tensor: Tensor, preference: str) -> int:
    """Say how many bytes :func:`encode` would make of a tensor, without making them.

    Raises:
        CodecError: If there is no such preference.
    """
    check_preference(preference)
    codec = codec_named("fp16" if preference == "half" else preference)
    return codec.layout.packed_bytes(tuple(tensor.shape), tensor.dtype)


def decode(meta: TensorMeta, payload: Buffer) -> Tensor:
    """Turn bytes from anywhere back into a tensor; see :meth:`Codec.decode`.

    Raises:
        CodecError: If the codec is unknown, or the bytes and their description do not fit together.
    """
    return codec_named(meta.codec).decode(meta, payload)


def splice(parts: Sequence[tuple[TensorMeta, Buffer, int, int]]) -> Encoded:
    """Make one encoded tensor of some rows of several, without reading a number: each row keeps its very bytes.

    Args:
        parts: Encoded tensors ``[N, D]``, all of one codec, format and width; for each, its description, its payload,
            and the first and one past the last of its rows that are wanted.

    Raises:
        CodecError: If the codec is unknown.
    """
    first = parts[0][0]
    width, format = first.shape[1], DTYPES[first.dtype]
    buffers: list[memoryview] = []
    for row_bytes, begin in codec_named(first.codec).layout.row_parts(width, format):
        pieces = []
        for meta, payload, start, stop in parts:
            offset = meta.shape[0] * begin
            pieces.append(memoryview(payload)[offset + start * row_bytes : offset + stop * row_bytes])
        buffers.append(memoryview(b"".join(pieces)))
    rows = sum(stop - start for _, _, start, stop in parts)
    nbytes = sum(buffer.nbytes for buffer in buffers)
    return Encoded(TensorMeta(first.codec, first.dtype, (rows, width), nbytes), tuple(buffers))


def check_preference(name: str) -> None:
    """Refuse a preference that nobody can serve.

    Raises:
        CodecError: If it is none of :data:`PREFERENCES`.
    """
    if name not in PREFERENCES:
        raise CodecError(f"there is no codec {name!r}; this version knows {', '.join(PREFERENCES)}")

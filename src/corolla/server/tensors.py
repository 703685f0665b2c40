"""The tensors of a server's requests and answers: from payloads into the engine, and back."""

from collections.abc import Sequence

import torch

from corolla.codec import decode, encode
from corolla.engine import Engine
from corolla.errors import UsageError
from corolla.wire import Buffer, TensorMeta, split_payload

__all__ = ["decode_tensors", "encode_tensors"]


def decode_tensors(
    engine: Engine, metas: Sequence[TensorMeta], payload: memoryview, *, axes: int
) -> list[torch.Tensor]:
    """Read the tensors of a request.

    Args:
        engine: For which the tensors must fit.
        metas: How to read them.
        payload: Their bytes.
        axes: How many axes each must have.

    Raises:
        UsageError: If a shape does not fit.
        CodecError: If the bytes and their descriptions do not fit together.
        RemoteProtocolError: Likewise.
    """
    span = engine.span
    for meta in metas:
        if len(meta.shape) != axes or meta.shape[-1] != span.hidden_size:
            raise UsageError(
                f"a tensor of shape {list(meta.shape)} was sent to blocks that take {axes} axes, the last of "
                f"{span.hidden_size} values"
            )
    parts = split_payload(payload, [meta.nbytes for meta in metas])
    tensors = [decode(meta, part) for meta, part in zip(metas, parts, strict=True)]
    return [tensor.to(span.dtype) for tensor in tensors]


def encode_tensors(tensors: Sequence[torch.Tensor], codec: str) -> tuple[tuple[TensorMeta, ...], list[Buffer]]:
    """Make the tensors of an answer: their descriptions, and their bytes."""
    encoded = [encode(tensor, codec) for tensor in tensors]
    return tuple(one.meta for one in encoded), [buffer for one in encoded for buffer in one.buffers]

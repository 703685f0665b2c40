"""The tensors of a server's requests and answers: from payloads into the engine, and back."""

from collections.abc import Sequence

import torch

from corolla.blocks import Adapter
from corolla.codec import all_finite, count_not_finite, decode, encode
from corolla.engine import Engine
from corolla.errors import InternalError, UsageError
from corolla.wire import Buffer, TensorMeta, split_payload

__all__ = ["check_finite", "decode_tensors", "encode_tensors"]


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
    return [tensor if tensor.dtype == span.dtype else tensor.to(span.dtype) for tensor in tensors]


def check_finite(
    inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor], engine: Engine, adapter: Adapter | None
) -> None:
    """Check that blocks have made numbers of numbers, before others are sent anything else.

    Args:
        inputs: What they were given; if that is none either, there is nothing to say.
        outputs: What they made of it.
        engine: Whose they are.
        adapter: What the client has added to them.

    Raises:
        UsageError: If they have not, with what was added to them.
        InternalError: If they have not, by themselves.
    """
    if all_finite(outputs) or not all_finite(inputs):
        return
    count = count_not_finite(outputs)
    if adapter is not None:
        raise UsageError(
            f"blocks {engine.span.span} made {count} numbers that are nan or infinite, with the adapter of blocks "
            f"{sorted(adapter.blocks)}; has its training diverged? Go back to an earlier one, and learn more slowly"
        )
    raise InternalError(
        f"blocks {engine.span.span} in {engine.span.dtype} made {count} numbers that are nan or infinite; a server of "
        "another precision may not"
    )


def encode_tensors(tensors: Sequence[torch.Tensor], codec: str) -> tuple[tuple[TensorMeta, ...], list[Buffer]]:
    """Make the tensors of an answer: their descriptions, and their bytes."""
    encoded = [encode(tensor, codec) for tensor in tensors]
    return tuple(one.meta for one in encoded), [buffer for one in encoded for buffer in one.buffers]

"""What messages are made of: numbers and texts with their bounds, tensors' descriptions, and failure."""

from typing import Annotated

import msgspec
from msgspec import Meta

from corolla.errors import Error, PeerBusy, revive
from corolla.terms import MODEL_ID_PATTERN, PEER_ID_PATTERN, DType, ModelId, PeerId
from corolla.wire.limits import MAX_ROWS, MAX_STEP_TOKENS, MAX_TENSORS
from corolla.wire.root import Message

__all__ = [
    "Blocks",
    "CheckedModelId",
    "CheckedPeerId",
    "CodecName",
    "Count",
    "Counts",
    "Failure",
    "Load",
    "Rows",
    "Seconds",
    "TensorMeta",
    "Timing",
    "Token",
    "Tokens",
    "TraceContext",
]

Count = Annotated[int, Meta(ge=0, le=2**53)]
_Positive = Annotated[int, Meta(gt=0, le=2**31 - 1)]
Tokens = Annotated[int, Meta(ge=0, le=MAX_STEP_TOKENS)]
_Row = Annotated[int, Meta(ge=0, lt=MAX_ROWS)]
Rows = Annotated[tuple[_Row, ...], Meta(max_length=MAX_ROWS)]
Counts = Annotated[tuple[Tokens, ...], Meta(min_length=1, max_length=MAX_ROWS)]
Blocks = Annotated[tuple[Count, ...], Meta(max_length=MAX_TENSORS)]
CodecName = Annotated[str, Meta(max_length=32)]
Seconds = Annotated[float, Meta(ge=0, le=1e9)]
_Text = Annotated[str, Meta(max_length=4096)]
CheckedModelId = Annotated[ModelId, Meta(pattern=MODEL_ID_PATTERN)]
CheckedPeerId = Annotated[PeerId, Meta(pattern=PEER_ID_PATTERN)]
Token = Annotated[bytes, Meta(min_length=16, max_length=16)]
TraceContext = Annotated[bytes, Meta(min_length=24, max_length=24)]


class TensorMeta(msgspec.Struct, frozen=True, array_like=True):
    """How to read one tensor of a payload.

    Args:
        codec: The name of the codec that made the bytes.
        dtype: The number format of the tensor before it was encoded, and again after it is decoded.
        shape: Its axes, at most four, none of them empty.
        nbytes: How many bytes of the payload it takes.
    """

    codec: CodecName
    dtype: DType
    shape: Annotated[tuple[_Positive, ...], Meta(min_length=1, max_length=4)]
    nbytes: Count


class Timing(msgspec.Struct, frozen=True, array_like=True):
    """Where a server's time went for one request, in seconds.

    Args:
        queue_s: Until it began.
        compute_s: From then on.
        found_tokens: How many of a step's tokens it need not compute, as it had computed the same before.
    """

    queue_s: Seconds
    compute_s: Seconds
    found_tokens: Count = 0


class Load(msgspec.Struct, frozen=True, array_like=True):
    """How busy a server is at this moment.

    Args:
        free_tokens: KV tokens that nobody was promised.
        sessions: Open sessions.
    """

    free_tokens: Count
    sessions: Count


class Failure(Message, frozen=True, tag=True):
    """The answer to a request that could not be met.

    Args:
        code: The ``code`` of a class in ``corolla/errors.py``.
        message: What happened, for people.
        retry_after_s: When the peer expects to have room again, if that is the trouble.
        number: Which step of a session could not be taken; 0 for anything else.
    """

    code: Annotated[str, Meta(max_length=64)]
    message: _Text
    retry_after_s: Seconds | None = None
    number: Count = 0

    @classmethod
    def of(cls, error: Error, number: int = 0) -> "Failure":
        """Put an error on the wire."""
        retry_after_s = error.retry_after_s if isinstance(error, PeerBusy) else None
        return cls(code=error.code, message=error.message[:4096], retry_after_s=retry_after_s, number=number)

    def error(self, peer: PeerId) -> Error:
        """Take the error off the wire, as reported by ``peer``."""
        return revive(self.code, self.message, peer=peer, retry_after_s=self.retry_after_s)

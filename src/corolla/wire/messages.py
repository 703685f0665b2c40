"""What peers say to each other: one frozen type a message, checked once, here, when it is decoded.

A stream is a conversation between two peers. The side that opened it speaks first; every message that asks for
something gets exactly one answer, a :class:`Failure` if need be. A session occupies its stream from
:class:`OpenSession` until :class:`Closed`; what is said in it is in ``wire/sessions.py``, and when, in
``wire/states.py``. Between sessions a stream can be used again.
"""

from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from corolla.errors import RemoteProtocolError
from corolla.terms import PeerId, Span
from corolla.wire.adapters import Adapt, BlockHashes
from corolla.wire.handover import HandedOver, HandOver, Leaving, Restore, Restored
from corolla.wire.limits import (
    MAX_BUCKETS,
    MAX_IDS,
    MAX_PROOF_BYTES,
    MAX_RECORDS,
    MAX_REVOKED_BYTES,
    MAX_TENSORS,
    RECORD_ID_BYTES,
)
from corolla.wire.parts import (
    Blocks,
    CheckedModelId,
    CodecName,
    Failure,
    Load,
    TensorMeta,
    Timing,
)
from corolla.wire.reach import REACH_MESSAGES
from corolla.wire.records import Record, Suspicion
from corolla.wire.root import Message
from corolla.wire.sessions import (
    Closed,
    CloseSession,
    Done,
    Expect,
    Feed,
    OpenSession,
    Output,
    Redirect,
    Redirected,
    Resume,
    SessionOpened,
    Step,
    Successor,
)
from corolla.wire.shelves import SHELF_MESSAGES

__all__ = [
    "Ack",
    "Adapt",
    "Backward",
    "CloseSession",
    "Closed",
    "Done",
    "Expect",
    "Failure",
    "Feed",
    "Forward",
    "Gradients",
    "Greeting",
    "HandOver",
    "HandedOver",
    "Leaving",
    "Load",
    "Message",
    "News",
    "OpenSession",
    "Output",
    "Ping",
    "Pong",
    "Publish",
    "Redirect",
    "Redirected",
    "Restore",
    "Restored",
    "Resume",
    "SessionOpened",
    "Step",
    "Subscribe",
    "Successor",
    "TensorMeta",
    "Timing",
    "decode_message",
    "encode_message",
    "expect",
]


class Ack(Message, frozen=True, tag=True):
    """The answer that says nothing but "done"."""


class Ping(Message, frozen=True, tag=True):
    """Asks for a :class:`Pong` at once; measures the round trip and whether the peer lives."""


class Pong(Message, frozen=True, tag=True):
    """Answers a :class:`Ping`."""


class Greeting(Message, frozen=True, tag=True):
    """Begins every stream in a private swarm: shows membership, and is answered by the other side's greeting.

    The side that opened the stream speaks first. Whoever knows the newer list of revoked invites sends it along: the
    answer holds it, or, if the opener has it, a second greeting does, which is answered like the first.

    Args:
        proof: Of membership; see ``swarm/members/membership.py``.
        number: Of the newest list of revoked invites that the sender knows; -1 for none.
        revoked: That list, if the other side is known to lack it.
    """

    proof: Annotated[bytes, Meta(max_length=MAX_PROOF_BYTES)]
    number: Annotated[int, Meta(ge=-1, le=2**53)] = -1
    revoked: Annotated[bytes, Meta(max_length=MAX_REVOKED_BYTES)] | None = None


class Forward(Message, frozen=True, tag=True):
    """Runs whole sequences through blocks and keeps nothing; answered by :class:`Output`.

    The payload is one tensor ``[B, T, D]``.

    Args:
        model: The weights that the client means.
        span: The blocks to run, within the server's span.
        hidden: The payload's tensor.
        codec: How the output should be encoded.
        attention_mask: One byte a token, ``B * T`` of them, 0 for padding; ``None`` if there is none.
        position_ids: Little-endian int32, ``B * T`` of them; ``None`` for 0, 1, 2, ...
        taps: Absolute indices of blocks whose outputs are wanted as well.
        adapters: What is added to each block.
    """

    model: CheckedModelId
    span: Span
    hidden: TensorMeta
    codec: CodecName
    attention_mask: bytes | None = None
    position_ids: bytes | None = None
    taps: Blocks = ()
    adapters: BlockHashes = ()


class Backward(Message, frozen=True, tag=True):
    """Asks for the gradient of blocks with respect to their input; answered by :class:`Gradients`.

    The payload is two or more tensors ``[B, T, D]``: the input of the first block, then the gradient of the loss with
    respect to the last block's output, then one for each tap. The server runs the blocks again from the input.

    Args:
        model: The weights that the client means.
        span: The blocks to run, within the server's span.
        tensors: The payload's tensors.
        codec: How the gradient should be encoded.
        attention_mask: As in the :class:`Forward`.
        position_ids: As in the :class:`Forward`.
        taps: As in the :class:`Forward`.
        adapters: As in the :class:`Forward`.
        trains: Whether the gradient with respect to the adapters is wanted as well.
    """

    model: CheckedModelId
    span: Span
    tensors: Annotated[tuple[TensorMeta, ...], Meta(min_length=2, max_length=MAX_TENSORS)]
    codec: CodecName
    attention_mask: bytes | None = None
    position_ids: bytes | None = None
    taps: Blocks = ()
    adapters: BlockHashes = ()
    trains: bool = False


class Gradients(Message, frozen=True, tag=True):
    """Answers :class:`Backward`: the gradient with respect to the input ``[B, T, D]``.

    Args:
        tensors: That gradient; then, if it is wanted, that of the adapters, all their numbers in a row.
        timing: Where the time went.
    """

    tensors: Annotated[tuple[TensorMeta, ...], Meta(min_length=1, max_length=2)]
    timing: Timing


_Records = Annotated[tuple[Record, ...], Meta(max_length=MAX_RECORDS)]
_Suspicions = Annotated[tuple[Suspicion, ...], Meta(max_length=MAX_RECORDS)]
_Ids = Annotated[bytes, Meta(max_length=MAX_IDS * RECORD_ID_BYTES)]
_Bucket = Annotated[int, Meta(ge=0, lt=MAX_BUCKETS)]


class News(Message, frozen=True, tag=True):
    """All that two servers say on a link, which the first one begins: when there is something, or as a sign of life.

    Lists of ids are ids of ``RECORD_ID_BYTES`` in a row.

    Args:
        ids: Of stamps that are new to the sender and may be so to the other side.
        wanted: Ids that the other side named, whose records are to be sent.
        bodies: The same, with their bodies.
        gone: Ids that the other side wanted and that were overtaken; what overtook them is in the records.
        records: What was wanted, or what nobody else can know yet.
        suspicions: That are new to the sender.
        sums: The sender's directory in brief: for each bucket of peers the sum of its ids; asks for a ``listing``.
        listing: Answers sums: the ids in every bucket that differs.
        is_last: Whether the sender leaves the link, of its own will.
    """

    ids: _Ids = b""
    wanted: _Ids = b""
    bodies: _Ids = b""
    gone: _Ids = b""
    records: _Records = ()
    suspicions: _Suspicions = ()
    sums: Annotated[bytes, Meta(max_length=MAX_BUCKETS * RECORD_ID_BYTES)] = b""
    listing: Annotated[dict[_Bucket, _Ids], Meta(max_length=MAX_BUCKETS)] | None = None
    is_last: bool = False


class Publish(Message, frozen=True, tag=True):
    """What has changed in the directory, for a subscriber; not answered.

    Args:
        records: The announcements; none is a sign of life.
        suspicions: The suspicions.
        is_whole: Whether all that the sender knows has now been sent once.
    """

    records: _Records
    suspicions: _Suspicions = ()
    is_whole: bool = False


class Subscribe(Message, frozen=True, tag=True):
    """Asks for all announcements and every change; answered by :class:`Publish` for as long as the stream lives."""


_CONCRETE = (
    Failure | Ack | Ping | Pong | Greeting
    | OpenSession | SessionOpened | Step | Output | Done | CloseSession | Closed
    | Expect | Redirect | Redirected | Feed | Resume
    | Leaving | HandOver | HandedOver | Restore | Restored
    | Forward | Backward | Gradients | Adapt
    | News | Publish | Subscribe
    | REACH_MESSAGES | SHELF_MESSAGES
)  # fmt: skip
_Expected = TypeVar("_Expected", bound=Message)
_ENCODER = msgspec.msgpack.Encoder()
_DECODER: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(_CONCRETE)


def encode_message(message: Message) -> bytes:
    """Turn a message into bytes."""
    return _ENCODER.encode(message)


def decode_message(data: bytes) -> Message:
    """Turn bytes into a message.

    Raises:
        RemoteProtocolError: If they are not one; nothing else, whatever the bytes.
    """
    try:
        return _DECODER.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OverflowError) as error:
        raise RemoteProtocolError(f"a message of {len(data)} bytes could not be read: {error}") from error


def expect(message: Message, expected: type[_Expected], *, peer: PeerId) -> _Expected:
    """Take a peer's answer as the type that it should have.

    Args:
        message: The answer.
        expected: Its type if all is well.
        peer: Who answered.

    Raises:
        Error: The one that the peer reported, if the answer is a :class:`Failure`.
        RemoteProtocolError: If the answer is of another type.
    """
    if isinstance(message, expected):
        return message
    if isinstance(message, Failure):
        raise message.error(peer)
    raise RemoteProtocolError(f"peer {peer[:8]} answered {type(message).__name__} where {expected.__name__} was due")

"""Bytes on a stream, cut into frames. Knows nothing of what the frames mean.

A frame is a 20-byte head, a message and a payload::

    magic "CRLA" | version u8 | 3 bytes | deadline_ms u32 | message_bytes u32 | payload_bytes u32
    message | zeros, so that the payload begins at a multiple of 64 bytes, if there is any | payload

Numbers are big-endian. A payload so aligned can be computed on where it was received. The first five bytes keep
their meaning in every version, so that peers of different versions can tell each other apart. ``deadline_ms`` is
how much time the sender still gives the receiver, 0 for no limit: remaining time travels, not a date, because
clocks differ.
"""

import struct
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from corolla.errors import FrameTooLarge, PeerOutdated, RemoteProtocolError
from corolla.wire.limits import MAX_MESSAGE_BYTES, MAX_PAYLOAD_BYTES, PROTOCOL_VERSION

__all__ = ["Buffer", "Frame", "FrameDecoder", "encode_frame", "split_payload"]

Buffer = bytes | bytearray | memoryview

MAGIC: Final = b"CRLA"
HEAD: Final = struct.Struct(">4sB3xIII")
ALIGNMENT: Final = 64


class Frame(NamedTuple):
    """One frame as it was received.

    Args:
        message: The typed part, still encoded.
        payload: The raw part; a view of memory that belongs to this frame alone, so it may be kept and written to.
        deadline_s: Seconds that the sender still gives, or ``None`` for no limit.
    """

    message: bytes
    payload: memoryview
    deadline_s: float | None


def encode_frame(message: bytes, payload: Sequence[Buffer] = (), *, deadline_s: float | None = None) -> list[Buffer]:
    """Lay out a frame without copying its payload.

    Args:
        message: The encoded message.
        payload: The payload's parts, in order.
        deadline_s: Seconds that the receiver has; ``None`` for no limit.

    Returns:
        Buffers to be sent one after another.

    Raises:
        FrameTooLarge: If a part is over its limit.
    """
    payload_bytes = sum(memoryview(part).nbytes for part in payload)
    if len(message) > MAX_MESSAGE_BYTES:
        raise FrameTooLarge(
            f"a message of {len(message)} bytes is over the limit of {MAX_MESSAGE_BYTES}; send less at once"
        )
    if payload_bytes > MAX_PAYLOAD_BYTES:
        raise FrameTooLarge(
            f"a payload of {payload_bytes} bytes is over the limit of {MAX_PAYLOAD_BYTES}; send fewer tokens at once"
        )
    deadline_ms = 0 if deadline_s is None else min(max(1, round(deadline_s * 1000)), 2**32 - 1)
    head = HEAD.pack(MAGIC, PROTOCOL_VERSION, deadline_ms, len(message), payload_bytes)
    return [head + message + bytes(_padding(len(message), payload_bytes)), *payload]


def _padding(message_bytes: int, payload_bytes: int) -> int:
    """Count the zeros between a message and its payload."""
    return -(HEAD.size + message_bytes) % ALIGNMENT if payload_bytes else 0


class FrameDecoder:
    """Turns received bytes into frames, whatever pieces they come in.

    Memory is taken only as bytes arrive, up to the limits, so a peer that promises much and sends little costs
    little. After an error the stream cannot be read any further, because the next frame's place is unknown.

    Attributes:
        max_bytes: A frame whose message and payload together are larger is refused; may be changed between two frames.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self.max_bytes = MAX_MESSAGE_BYTES + MAX_PAYLOAD_BYTES

    @property
    def is_between_frames(self) -> bool:
        """Whether every byte so far belonged to a finished frame; if the stream ends otherwise, it was cut."""
        return not self._buffer

    @property
    def held_bytes(self) -> int:
        """How many bytes wait for the rest of their frame."""
        return len(self._buffer)

    def receive(self, data: Buffer) -> Iterator[Frame]:
        """Take the next bytes of the stream and yield the frames that they complete.

        Args:
            data: Any number of bytes.

        Raises:
            PeerOutdated: If the other side speaks another version of the protocol.
            FrameTooLarge: If a frame announces a part over its limit.
            RemoteProtocolError: If the bytes are not a frame at all.
        """
        self._buffer += data
        while (head := self._head()) is not None:
            deadline_ms, message_bytes, payload_bytes = head
            start = HEAD.size + message_bytes + _padding(message_bytes, payload_bytes)
            end = start + payload_bytes
            if len(self._buffer) < end:
                return
            whole = memoryview(self._buffer)
            message = bytes(whole[HEAD.size : HEAD.size + message_bytes])
            if len(self._buffer) == end:  # the common case: hand the memory over instead of copying it
                self._buffer = bytearray()
                payload = whole[start:end]
            else:
                payload = memoryview(bytearray(whole[start:end]))
                whole.release()
                del self._buffer[:end]
            yield Frame(message, payload, deadline_ms / 1000 if deadline_ms else None)

    def take_rest(self) -> bytes:
        """Give up what has come after the last frame: the bytes of whatever follows the frames on this stream."""
        rest, self._buffer = bytes(self._buffer), bytearray()
        return rest

    def _head(self) -> tuple[int, int, int] | None:
        start = bytes(self._buffer[:5])
        if start[:4] != MAGIC[: len(start)]:
            raise RemoteProtocolError(
                f"expected a frame, got the bytes {start[:4].hex(' ')}: not a Corolla peer, or a broken one"
            )
        if len(start) == 5 and start[4] != PROTOCOL_VERSION:
            raise PeerOutdated(
                f"the peer speaks protocol version {start[4]}, this one {PROTOCOL_VERSION}; upgrade the older one"
            )
        if len(self._buffer) < HEAD.size:
            return None
        _, _, deadline_ms, message_bytes, payload_bytes = HEAD.unpack_from(self._buffer)
        if message_bytes > MAX_MESSAGE_BYTES:
            raise FrameTooLarge(
                f"the peer announced a message of {message_bytes} bytes; the limit is {MAX_MESSAGE_BYTES}"
            )
        if payload_bytes > MAX_PAYLOAD_BYTES:
            raise FrameTooLarge(f"the peer announced {payload_bytes} payload bytes; {MAX_PAYLOAD_BYTES} is the limit")
        if message_bytes + payload_bytes > self.max_bytes:
            raise FrameTooLarge(
                f"a stranger announced {message_bytes + payload_bytes} bytes at once; {self.max_bytes} is its limit"
            )
        return deadline_ms, message_bytes, payload_bytes


def split_payload(payload: memoryview, sizes: Sequence[int]) -> list[memoryview]:
    """Cut a payload into consecutive parts.

    Args:
        payload: The whole payload.
        sizes: The size of each part in bytes.

    Raises:
        RemoteProtocolError: If the sizes do not add up to the payload.
    """
    if sum(sizes) != payload.nbytes:
        raise RemoteProtocolError(f"the message describes {sum(sizes)} payload bytes, the frame holds {payload.nbytes}")
    parts, start = [], 0
    for size in sizes:
        parts.append(payload[start : start + size])
        start += size
    return parts

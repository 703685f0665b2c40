"""What TLS runs over: a connection of its own, or the bytes of another stream. Knows nothing of TLS or peers."""

from collections.abc import Awaitable, Callable
from typing import Protocol

import anyio

from corolla.swarm.transports.transport import Stream

__all__ = ["Pipe", "TunnelPipe"]

_RECEIVE_BYTES = 1 << 17


class Pipe(Protocol):
    """Plain bytes both ways; :class:`corolla.swarm.transports.tcp.TcpPipe` says what each method does."""

    @property
    def is_quiet(self) -> bool:
        """Whether the connection stands and nothing waits to be received."""

    async def receive(self) -> bytes:
        """Wait for bytes; none at the end."""

    async def send(self, data: bytes) -> None:
        """Send bytes, waiting for room."""

    @property
    def writer(self) -> Callable[[bytes], None] | None:
        """What sends bytes without waiting; ``None`` while that cannot be done."""

    async def send_eof(self) -> None:
        """Say that no more bytes follow."""

    async def aclose(self, *, flush: bool = True) -> None:
        """Close the connection."""


class TunnelPipe:
    """A :class:`Pipe` made of a stream to somebody who passes all bytes on to somebody else.

    Args:
        stream: The stream.
        received: Bytes that have come already.
        close: What gives the stream back to its owner; called once.
    """

    def __init__(self, stream: Stream, received: bytes, close: Callable[[], Awaitable[None]]) -> None:
        self._stream = stream
        self._received = received
        self._close: Callable[[], Awaitable[None]] | None = close

    @property
    def is_quiet(self) -> bool:
        """Whether the stream stands and nothing waits to be received."""
        return not self._received and self._stream.is_quiet

    async def receive(self) -> bytes:
        """Wait for bytes; none at the end.

        Raises:
            anyio.BrokenResourceError: If the stream broke.
            anyio.ClosedResourceError: If this side closed it.
        """
        received, self._received = self._received, b""
        if received:
            return received
        try:
            return await self._stream.receive(_RECEIVE_BYTES)
        except anyio.EndOfStream:
            return b""

    async def send(self, data: bytes) -> None:
        """Send bytes, waiting for room.

        Raises:
            anyio.BrokenResourceError: If the stream broke.
            anyio.ClosedResourceError: If this side closed it.
        """
        await self._stream.send(data)

    @property
    def writer(self) -> None:
        """None: what is written goes through another stream, which may have to wait."""
        return None

    async def send_eof(self) -> None:
        """Say that no more bytes follow.

        Raises:
            anyio.BrokenResourceError: If the stream broke.
            anyio.ClosedResourceError: If this side closed it.
        """
        await self._stream.send_eof()

    async def aclose(self, *, flush: bool = True) -> None:
        """Close the stream.

        Args:
            flush: What a connection of its own would need.
        """
        if self._close is not None:
            close, self._close = self._close, None
            await close()

"""A transport that counts the bytes which pass through another one, both ways."""

from collections.abc import Sequence
from typing import Any

from corolla.swarm.transports.transport import Listener, Stream, Transport
from corolla.terms import Address, PeerId

__all__ = ["CountingTransport"]


class CountingTransport:
    """Dials and listens as another transport does, and counts what the streams that it dials carry.

    Args:
        inner: The other transport.

    Attributes:
        sent_bytes: How many bytes were sent so far.
        received_bytes: How many came.
    """

    def __init__(self, inner: Transport) -> None:
        self.sent_bytes = 0
        self.received_bytes = 0
        self._inner = inner

    @property
    def scheme(self) -> str:
        """What its addresses begin with."""
        return self._inner.scheme

    @property
    def total_bytes(self) -> int:
        """How many bytes have travelled, both ways together."""
        return self.sent_bytes + self.received_bytes

    async def listen(self, host: str, port: int, *, announce: Sequence[Address] = ()) -> Listener:
        """Open an ear; what it hears is not counted.

        Raises:
            ConfigError: If the inner transport cannot listen there.
        """
        return await self._inner.listen(host, port, announce=announce)

    async def dial(self, peer: PeerId | None, address: Address) -> Stream:
        """Open a stream whose bytes are counted.

        Raises:
            PeerUnreachable: If nobody answers there in time, or it is another peer.
            ConfigError: If the address is not one of this transport.
        """
        return _CountedStream(await self._inner.dial(peer, address), self)


class _CountedStream:
    """A stream whose bytes are counted; for the rest it is the inner one."""

    def __init__(self, inner: Stream, counts: CountingTransport) -> None:
        self._inner = inner
        self._counts = counts

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the inner stream has
        return getattr(self._inner, name)

    async def receive(self, max_bytes: int = 65536) -> bytes:
        data = await self._inner.receive(max_bytes)
        self._counts.received_bytes += len(data)
        return data

    async def send(self, data: bytes | bytearray | memoryview) -> None:
        self._counts.sent_bytes += memoryview(data).nbytes
        await self._inner.send(data)

"""The seam between Corolla and networks: what a transport must do, and nothing of how.

Above it are channels, which know messages; below it sockets, or a dictionary in tests. Nothing below it leaks: no
transport's own exception or address type passes. In TLS over TCP every stream is a connection of its own, so the seam
has streams and no connections; what one may want to know of the connection, the kind of its path, is on the stream.
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import Literal, NamedTuple, Protocol

from corolla.terms import Address, PeerId

__all__ = ["Ends", "Listener", "Path", "Spot", "Stream", "StreamHandler", "Transport"]

Path = Literal["direct", "relayed", "memory"]
"""How the bytes travel: straight to the peer, through a third one, or not at all."""


class Spot(NamedTuple):
    """An end of a connection on an IP network.

    Args:
        host: An IP address.
        port: A port.
    """

    host: str
    port: int


class Ends(NamedTuple):
    """The two ends of a connection, as this machine sees them; routers in between may show others to the other side.

    Args:
        here: This side's.
        there: The other side's.
    """

    here: Spot
    there: Spot


class Stream(Protocol):
    """Bytes in order, both ways, to and from a peer whose identity was proved before the first of them.

    Buffers are bounded on both sides: whoever sends faster than the other side receives, waits. One task may send while
    another receives. After a send or a receive was cancelled or has failed, bytes may be lost: only close it then.
    """

    @property
    def peer(self) -> PeerId:
        """Who is on the other side."""

    @property
    def path(self) -> Path:
        """How the bytes travel."""

    @property
    def ends(self) -> Ends | None:
        """Between which ends the bytes travel, if straight over an IP network."""

    @property
    def is_quiet(self) -> bool:
        """Whether the stream is whole as far as known now, and nothing has arrived that was not received yet."""

    async def receive(self, max_bytes: int = 65536) -> bytes:
        """Wait for the next bytes.

        Args:
            max_bytes: At most this many; at least one comes.

        Raises:
            anyio.EndOfStream: If the other side has sent all it wanted to send.
            anyio.BrokenResourceError: If the stream broke.
            anyio.ClosedResourceError: If this side closed it.
        """

    async def send(self, data: bytes | bytearray | memoryview) -> None:
        """Send bytes, waiting for room in the buffers.

        Raises:
            anyio.BrokenResourceError: If the stream broke, or the other side closed it.
            anyio.ClosedResourceError: If this side closed it or has sent its end.
        """

    def send_now(self, data: bytes) -> bool:
        """Send bytes if that can be done without waiting for anything; say whether it was. If not, nothing was sent.

        Raises:
            anyio.BrokenResourceError: If the stream broke.
        """

    async def send_eof(self) -> None:
        """Say that no more bytes follow; receiving goes on.

        Raises:
            anyio.BrokenResourceError: If the stream broke.
            anyio.ClosedResourceError: If this side closed it.
        """

    async def aclose(self) -> None:
        """Close both directions; what was sent before still arrives if the other side reads on. Never fails."""


StreamHandler = Callable[[Stream], Awaitable[None]]
"""What a listener calls for every stream; it closes nothing and raises nothing."""


class Listener(Protocol):
    """An open ear of this peer."""

    @property
    def addresses(self) -> tuple[Address, ...]:
        """Where other peers can dial it, the likeliest first."""

    async def serve(self, handler: StreamHandler) -> None:
        """Accept streams until cancelled, each in a task of its own, and close each when its handler returns.

        Whoever does not finish the handshake in time, or has no identity to show, costs that one connection.
        """

    async def aclose(self) -> None:
        """Stop listening."""


class Transport(Protocol):
    """A way to reach peers."""

    @property
    def scheme(self) -> str:
        """What its addresses begin with."""

    async def listen(self, host: str, port: int, *, announce: Sequence[Address] = ()) -> Listener:
        """Open an ear.

        Args:
            host: Where, in this transport's terms; for IP the address of an interface.
            port: Which port; 0 for any that is free.
            announce: What the listener shall give as its addresses instead of what it finds itself.

        Raises:
            ConfigError: If it cannot listen there; says why and what helps.
        """

    async def dial(self, peer: PeerId | None, address: Address) -> Stream:
        """Open a stream.

        Args:
            peer: Who must be there; ``None`` for whoever is, which is how a newcomer starts.
            address: Where.

        Raises:
            PeerUnreachable: If nobody answers there in time, or it is another peer; says which.
            ConfigError: If the address is not one of this transport.
        """

"""A network inside one process, under the contract of the real ones, with faults on demand. For tests and examples."""

import math
from collections import deque
from collections.abc import Sequence
from typing import Final

import anyio

from corolla.errors import ConfigError, PeerUnreachable
from corolla.swarm.address import format_address, split_address
from corolla.swarm.identity import Identity
from corolla.swarm.transports.transport import Path, StreamHandler
from corolla.terms import Address, PeerId

__all__ = ["MemoryListener", "MemoryNetwork", "MemoryStream", "MemoryTransport"]

SCHEME: Final = "memory"
BUFFER_BYTES: Final = 1 << 18
_MAX_WAITING: Final = 1024


class MemoryNetwork:
    """What the memory transports of several peers have in common.

    Args:
        delay_s: How long every byte is under way, in seconds; may be changed at any time.
    """

    def __init__(self, *, delay_s: float = 0.0) -> None:
        self.delay_s = delay_s
        self._listeners: dict[Address, MemoryListener] = {}
        self._streams: set[MemoryStream] = set()
        self._cut: set[PeerId] = set()
        self._separated: set[frozenset[PeerId]] = set()
        self._drops: dict[PeerId, int] = {}
        self._next_port = 1

    def transport(self, identity: Identity) -> "MemoryTransport":
        """Give a peer its way into this network."""
        return MemoryTransport(self, identity.peer_id)

    def cut(self, peer: PeerId) -> None:
        """Break all streams of a peer, and let nobody dial it, nor it anybody, until :meth:`mend`."""
        self._cut.add(peer)
        for stream in [stream for stream in self._streams if peer in (stream.owner, stream.peer)]:
            stream.break_now()

    def mend(self, peer: PeerId) -> None:
        """Undo :meth:`cut`."""
        self._cut.discard(peer)

    def separate(self, one: PeerId, other: PeerId) -> None:
        """Let two peers not reach each other any more, and break the streams between them."""
        self._separated.add(frozenset((one, other)))
        for stream in [stream for stream in self._streams if {stream.owner, stream.peer} == {one, other}]:
            stream.break_now()

    def drop_after(self, peer: PeerId, nbytes: int) -> None:
        """Break the next stream on which a peer has sent this many bytes from now on, once."""
        self._drops[peer] = nbytes

    def _note_sent(self, stream: "MemoryStream", nbytes: int) -> None:
        if stream.owner in self._drops:
            self._drops[stream.owner] -= nbytes
            if self._drops[stream.owner] <= 0:
                del self._drops[stream.owner]
                stream.break_now()

    def _add_listener(self, owner: PeerId, host: str, port: int, announce: Sequence[Address]) -> "MemoryListener":
        if port == 0:
            port, self._next_port = self._next_port, self._next_port + 1
        address = format_address(SCHEME, host, port)
        if address in self._listeners:
            raise ConfigError(
                f"port {port} of {host} is in use by another peer of this network; choose another (0 for any)"
            )
        listener = MemoryListener(self, owner, address, tuple(announce) or (address,))
        self._listeners[address] = listener
        return listener

    def _connect(self, dialler: PeerId, peer: PeerId | None, address: Address) -> "MemoryStream":
        listener = self._listeners.get(address)
        if (
            listener is None
            or self._cut & {dialler, listener.owner}
            or frozenset((dialler, listener.owner)) in self._separated
        ):
            raise PeerUnreachable(f"{address}: nobody listens there", peer=peer)
        if peer not in (None, listener.owner):
            raise PeerUnreachable(f"{address}: expected peer {peer}, found peer {listener.owner}", peer=peer)
        there, back = _Pipe(self), _Pipe(self)
        near = MemoryStream(self, dialler, listener.owner, (back, there))
        far = MemoryStream(self, listener.owner, dialler, (there, back))
        listener.offer(far)
        self._streams |= {near, far}
        return near


class MemoryTransport:
    """The ``memory`` transport of one peer; made by :meth:`MemoryNetwork.transport`.

    Args:
        network: What it is a way into.
        owner: Whose it is.
    """

    def __init__(self, network: MemoryNetwork, owner: PeerId) -> None:
        self._network = network
        self._owner = owner

    @property
    def scheme(self) -> str:
        """What its addresses begin with."""
        return SCHEME

    async def listen(self, host: str, port: int, *, announce: Sequence[Address] = ()) -> "MemoryListener":
        """Open an ear; see :meth:`corolla.swarm.Transport.listen`.

        Raises:
            ConfigError: If the port is taken.
        """
        return self._network._add_listener(self._owner, host, port, announce)

    async def dial(self, peer: PeerId | None, address: Address) -> "MemoryStream":
        """Open a stream; see :meth:`corolla.swarm.Transport.dial`.

        Raises:
            PeerUnreachable: If nobody answers there, or it is another peer; says which.
            ConfigError: If the address is not one of this transport.
        """
        if split_address(address).scheme != SCHEME:
            raise ConfigError(f"{address} is not an address of the {SCHEME} transport")
        await anyio.sleep(2 * self._network.delay_s)
        return self._network._connect(self._owner, peer, address)


class MemoryListener:
    """A :class:`~corolla.swarm.Listener` of a memory network.

    Args:
        network: Where it listens.
        owner: Whose it is.
        address: Where it can be found.
        addresses: What it says its addresses are.
    """

    def __init__(self, network: MemoryNetwork, owner: PeerId, address: Address, addresses: tuple[Address, ...]) -> None:
        self.owner = owner
        self.addresses = addresses
        self._network = network
        self._address = address
        self._offers, self._arrivals = anyio.create_memory_object_stream["MemoryStream"](_MAX_WAITING)

    def offer(self, stream: "MemoryStream") -> None:
        """Put a stream before the listener.

        Raises:
            PeerUnreachable: If too many wait already.
        """
        try:
            self._offers.send_nowait(stream)
        except anyio.WouldBlock as error:
            raise PeerUnreachable(f"{self._address}: {_MAX_WAITING} streams wait already", peer=self.owner) from error

    async def serve(self, handler: StreamHandler) -> None:
        """Accept streams until cancelled; see :meth:`corolla.swarm.Listener.serve`."""
        async with anyio.create_task_group() as tasks:
            async for stream in self._arrivals:
                tasks.start_soon(self._serve_stream, stream, handler)

    async def aclose(self) -> None:
        """Stop listening; streams that nobody accepted are closed."""
        self._network._listeners.pop(self._address, None)
        self._offers.close()
        while self._arrivals.statistics().current_buffer_used:
            await self._arrivals.receive_nowait().aclose()
        self._arrivals.close()

    async def _serve_stream(self, stream: "MemoryStream", handler: StreamHandler) -> None:
        try:
            await handler(stream)
        finally:
            await stream.aclose()


class MemoryStream:
    """A :class:`~corolla.swarm.Stream` between two peers of a memory network.

    Args:
        network: Where it is.
        owner: The peer on this side.
        peer: The peer on the other side.
        pipes: Where its bytes come from, and where they go.
    """

    def __init__(self, network: MemoryNetwork, owner: PeerId, peer: PeerId, pipes: tuple["_Pipe", "_Pipe"]) -> None:
        self.owner = owner
        self.peer = peer
        self._network = network
        self._incoming, self._outgoing = pipes
        self._is_closed = False

    @property
    def path(self) -> Path:
        """How the bytes travel."""
        return "memory"

    @property
    def ends(self) -> None:
        """There is no network."""
        return None

    @property
    def is_quiet(self) -> bool:
        """Whether the stream stands and nothing waits to be received."""
        return not self._is_closed and self._incoming.is_empty and not self._outgoing.is_broken

    async def receive(self, max_bytes: int = 65536) -> bytes:
        """Wait for the next bytes; see :meth:`corolla.swarm.Stream.receive`."""
        if self._is_closed:
            raise anyio.ClosedResourceError
        return await self._incoming.get(max_bytes)

    async def send(self, data: bytes | bytearray | memoryview) -> None:
        """Send bytes; see :meth:`corolla.swarm.Stream.send`."""
        if self._is_closed:
            raise anyio.ClosedResourceError
        view = memoryview(data).cast("B")
        for start in range(0, view.nbytes, BUFFER_BYTES):
            piece = bytes(view[start : start + BUFFER_BYTES])
            await self._outgoing.put(piece)
            self._network._note_sent(self, len(piece))

    def send_now(self, data: bytes) -> bool:
        """Send bytes if there is room; see :meth:`corolla.swarm.Stream.send_now`."""
        if self._is_closed or not self._outgoing.has_room:
            return False
        self._outgoing.put_now(data)
        self._network._note_sent(self, len(data))
        return True

    async def send_eof(self) -> None:
        """Say that no more bytes follow; see :meth:`corolla.swarm.Stream.send_eof`."""
        if self._is_closed:
            raise anyio.ClosedResourceError
        self._outgoing.end()

    async def aclose(self) -> None:
        """Close both directions; see :meth:`corolla.swarm.Stream.aclose`."""
        self._is_closed = True
        self._outgoing.end()
        self._incoming.abandon()
        self._network._streams.discard(self)

    def break_now(self) -> None:
        """Lose the stream in both directions, with all that is under way."""
        self._incoming.break_now()
        self._outgoing.break_now()


class _Pipe:
    """Bytes in one direction; at most ``BUFFER_BYTES`` and one piece more are under way."""

    def __init__(self, network: MemoryNetwork) -> None:
        self._network = network
        self._pieces: deque[tuple[float, bytes]] = deque()  # when they arrive
        self._nbytes = 0
        self._is_at_end = False
        self._changed = anyio.Event()
        self.is_broken = False

    @property
    def is_empty(self) -> bool:
        return not (self._pieces or self._is_at_end or self.is_broken)

    @property
    def has_room(self) -> bool:
        return self._nbytes < BUFFER_BYTES and not (self.is_broken or self._is_at_end)

    def put_now(self, piece: bytes) -> None:
        self._pieces.append((self._arrival(), piece))
        self._nbytes += len(piece)
        self._notify()

    async def put(self, piece: bytes) -> None:
        while self._nbytes >= BUFFER_BYTES and not (self.is_broken or self._is_at_end):
            await self._changed.wait()
        if self._is_at_end:
            raise anyio.ClosedResourceError
        await anyio.lowlevel.checkpoint()
        if self.is_broken:
            raise anyio.BrokenResourceError
        self.put_now(piece)

    async def get(self, max_bytes: int) -> bytes:
        await anyio.lowlevel.checkpoint()
        while (wait_s := self._wait_s()) > 0:
            with anyio.move_on_after(wait_s):
                await self._changed.wait()
        at, piece = self._pieces.popleft()
        if len(piece) > max_bytes:
            self._pieces.appendleft((at, piece[max_bytes:]))
            piece = piece[:max_bytes]
        self._nbytes -= len(piece)
        self._notify()
        return piece

    def _wait_s(self) -> float:
        """Say when the next piece arrives, as far as known."""
        if self.is_broken:
            raise anyio.BrokenResourceError
        if self._pieces:
            return self._pieces[0][0] - anyio.current_time()
        if self._is_at_end:
            raise anyio.EndOfStream
        return math.inf

    def end(self) -> None:
        self._is_at_end = True
        self._notify()

    def abandon(self) -> None:
        """The receiver has gone: whoever still sends into this pipe finds it broken."""
        if not self._is_at_end or self._pieces:
            self.break_now()

    def break_now(self) -> None:
        self.is_broken = True
        self._pieces.clear()
        self._nbytes = 0
        self._notify()

    def _arrival(self) -> float:
        earliest = self._pieces[-1][0] if self._pieces else 0.0
        return max(earliest, anyio.current_time() + self._network.delay_s) if self._network.delay_s else earliest

    def _notify(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

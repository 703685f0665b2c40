"""Plain bytes over TCP with bounded buffers: what ``transports/tls.py`` encrypts. Knows neither peers nor messages.

An asyncio protocol rather than AnyIO's streams: with TLS on top, 16 KB there and back on loopback take 0.20 ms so, and
0.27 ms with AnyIO's (medians of 3,200 on Python 3.11; asyncio's own TLS streams, which have no half-close, 0.19 ms).
"""

import asyncio
import errno
import socket
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Final, Self, cast

import anyio
from anyio import to_thread

from corolla.errors import ConfigError, InternalError
from corolla.swarm.config import SwarmConfig
from corolla.swarm.transports.race import race
from corolla.swarm.transports.transport import Ends, Spot

__all__ = ["TcpListener", "TcpPipe", "connect_pipe", "connect_spot", "find_local_hosts", "share_port"]

BUFFER_BYTES: Final = 1 << 18
"""Received bytes kept for a pipe before the kernel is made to hold the sender back; sent ones before a sender waits."""

_CLOSE_S: Final = 1.0
_BACKLOG: Final = 256  # connections that wait in the kernel
_MAX_WAITING: Final = 256  # and in this program


class TcpPipe(asyncio.Protocol):
    """One TCP connection; made by :class:`TcpListener` and :func:`connect_pipe`. One task may send, another receive.

    Args:
        on_open: What to call once the connection stands.
    """

    def __init__(self, on_open: Callable[["TcpPipe"], None] | None = None) -> None:
        self._on_open = on_open
        self._transport: asyncio.Transport | None = None
        self._received: deque[bytes] = deque()
        self._received_bytes = 0
        self._is_at_end = False
        self._is_full = False
        self._is_closed = False
        self._is_lost = asyncio.Event()
        self._error: Exception | None = None
        self._receiver: asyncio.Future[None] | None = None
        self._sender: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio first of all."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=BUFFER_BYTES, low=BUFFER_BYTES // 4)
        if self._on_open is not None:
            self._on_open(self)

    def data_received(self, data: bytes) -> None:
        """Called by asyncio with new bytes."""
        self._received.append(data)
        self._received_bytes += len(data)
        if self._received_bytes >= BUFFER_BYTES:
            self._open.pause_reading()
        _wake(self._receiver)

    def eof_received(self) -> bool:
        """Called by asyncio at the end of the other side's bytes; this side may go on sending."""
        self._is_at_end = True
        _wake(self._receiver)
        return True

    def connection_lost(self, error: Exception | None) -> None:
        """Called by asyncio last of all."""
        self._error = error
        self._is_lost.set()
        _wake(self._receiver)
        _wake(self._sender)

    def pause_writing(self) -> None:
        """Called by asyncio when too much waits to be sent."""
        self._is_full = True

    def resume_writing(self) -> None:
        """Called by asyncio when most of it was sent."""
        self._is_full = False
        _wake(self._sender)

    @property
    def is_quiet(self) -> bool:
        """Whether the connection stands and no received byte or end waits here."""
        return not (self._is_closed or self._is_lost.is_set() or self._is_at_end or self._received)

    @property
    def ends(self) -> Ends:
        """Between which ends the connection is."""
        return Ends(_spot(self._open.get_extra_info("sockname")), _spot(self._open.get_extra_info("peername")))

    async def receive(self) -> bytes:
        """Wait for bytes and take all that are there, at most about twice ``BUFFER_BYTES``; none at the end.

        Raises:
            anyio.BrokenResourceError: If the connection broke.
            anyio.ClosedResourceError: If this side closed it.
        """
        while not self._received:
            self._check(ignore_clean_loss=True)
            if self._is_at_end or self._is_lost.is_set():
                return b""
            self._receiver = asyncio.get_running_loop().create_future()
            try:
                await self._receiver
            finally:
                self._receiver = None
        data = self._received.popleft() if len(self._received) == 1 else b"".join(self._received)
        self._received.clear()
        if self._received_bytes >= BUFFER_BYTES and not self._open.is_closing():
            self._open.resume_reading()
        self._received_bytes = 0
        return data

    @property
    def writer(self) -> Callable[[bytes], None] | None:
        """What sends bytes without waiting, as long as the connection stands and few bytes wait to be sent."""
        return None if self._is_full or self._is_closed or self._is_lost.is_set() else self._open.write

    async def send(self, data: bytes) -> None:
        """Send bytes, waiting if too many are under way.

        Raises:
            anyio.BrokenResourceError: If the connection broke.
            anyio.ClosedResourceError: If this side closed it.
        """
        self._check()
        self._open.write(data)
        while self._is_full:
            self._sender = asyncio.get_running_loop().create_future()
            try:
                await self._sender
            finally:
                self._sender = None
            self._check()

    async def send_eof(self) -> None:
        """Say that no more bytes follow, once all are sent.

        Raises:
            anyio.BrokenResourceError: If the connection broke.
            anyio.ClosedResourceError: If this side closed it.
        """
        self._check()
        try:
            self._open.write_eof()
        except OSError as error:  # the other side is gone, and asyncio has not noticed yet
            raise anyio.BrokenResourceError from error

    def tune(self, config: SwarmConfig) -> None:
        """Set the socket up: no waiting to fill packets; a vanished host is noticed after 2 s and three silent ones.

        Raises:
            OSError: If the connection is gone already.
        """
        numbers = {"TCP_NODELAY": 1, "TCP_KEEPIDLE": 2, "TCP_KEEPALIVE": 2, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 3}
        # Keep-alive probes rest while bytes are under way; this is the limit for those. It also ends a connection whose
        # other side reads nothing at all for so long.
        numbers["TCP_USER_TIMEOUT"] = round(config.stall_s * 1000)
        connection = self._open.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in numbers.items():
            option: int | None = getattr(socket, name, None)  # not every platform has every one
            if option is not None:
                connection.setsockopt(socket.IPPROTO_TCP, option, value)

    def abort(self) -> None:
        """Close the connection now, whatever is under way."""
        self._is_closed = True
        self._open.abort()

    async def aclose(self, *, flush: bool = True) -> None:
        """Close the connection, within a second; waits even if cancelled, so that no socket outlives its owner.

        Args:
            flush: Whether to give bytes under way that second.
        """
        self._is_closed = True
        _wake(self._receiver)
        _wake(self._sender)
        if flush:
            self._open.close()
            with anyio.CancelScope(deadline=anyio.current_time() + _CLOSE_S, shield=True):
                await self._is_lost.wait()
        self._open.abort()
        with anyio.CancelScope(shield=True):
            await self._is_lost.wait()

    @property
    def _open(self) -> asyncio.Transport:
        if self._transport is None:
            raise InternalError("a connection was used before it was made")
        return self._transport

    def _check(self, *, ignore_clean_loss: bool = False) -> None:
        if self._is_closed:
            raise anyio.ClosedResourceError
        if self._is_lost.is_set() and not (ignore_clean_loss and self._error is None):
            raise anyio.BrokenResourceError from self._error


def _wake(waiter: asyncio.Future[None] | None) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)


class TcpListener:
    """A listening TCP port; made by :meth:`open`.

    It uses asyncio's own server, because ``loop.sock_accept`` can lose a connection when it is cancelled.

    Args:
        bound: The listening socket, which belongs to this object from now on.
        config: The limits.
    """

    def __init__(self, bound: socket.socket, config: SwarmConfig) -> None:
        self.port: int = bound.getsockname()[1]
        self._bound = bound
        self._config = config
        self._server: asyncio.Server | None = None
        self._offers, self._arrivals = anyio.create_memory_object_stream[TcpPipe](_MAX_WAITING)

    @classmethod
    async def open(cls, host: str, port: int, config: SwarmConfig) -> Self:
        """Open a port.

        Args:
            host: The address of an interface; ``0.0.0.0`` or ``::`` for all.
            port: Which port; 0 for any that is free.
            config: The limits.

        Raises:
            ConfigError: If the port is taken or the address is not this machine's.
        """
        return cls(await to_thread.run_sync(_bind_socket, host, port), config)

    async def accept(self) -> TcpPipe:
        """Wait for a connection."""
        if self._server is None:
            loop = asyncio.get_running_loop()
            self._server = await loop.create_server(lambda: TcpPipe(self._offer), sock=self._bound, backlog=_BACKLOG)
        return await self._arrivals.receive()

    async def aclose(self) -> None:
        """Stop listening; connections that nobody accepted are closed."""
        if self._server is not None:
            self._server.close()
        self._bound.close()
        self._offers.close()
        while self._arrivals.statistics().current_buffer_used:
            await self._arrivals.receive_nowait().aclose(flush=False)
        self._arrivals.close()

    def _offer(self, pipe: TcpPipe) -> None:
        """Put a new connection before :meth:`accept`; if too many wait there, close it."""
        try:
            pipe.tune(self._config)
            self._offers.send_nowait(pipe)
        except (anyio.WouldBlock, anyio.ClosedResourceError, anyio.BrokenResourceError, OSError):
            pipe.abort()


def _bind_socket(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        is_dual = family == socket.AF_INET6 and host == "::" and socket.has_dualstack_ipv6()
        bound = socket.create_server(place[:2], family=family, backlog=_BACKLOG, dualstack_ipv6=is_dual)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port {port} of {host} is in use by another program; stop it, or choose another port (0 for any)"
            ) from error
        raise ConfigError(f"cannot listen on port {port} of {host}: {error.strerror or error}") from error
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"cannot listen on port {port} of {host!r}: {error}") from error
    bound.setblocking(False)
    return bound


async def connect_pipe(host: str, port: int, config: SwarmConfig) -> TcpPipe:
    """Connect to a host, racing its addresses if it has several.

    It does not use asyncio's own race, which loses a socket when it is cancelled at the wrong moment.

    Raises:
        OSError: If it cannot be resolved or does not answer.
    """
    problems: list[OSError] = []

    async def attempt(family: socket.AddressFamily, place: tuple[str, int]) -> TcpPipe | None:
        try:
            return await _connect(family, place, config)
        except OSError as error:
            problems.append(error)
            return None

    try:
        resolved = await anyio.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except ValueError as error:  # remote peers may announce any text
        raise OSError(f"{host!r} is not the name of a host") from error
    attempts = [partial(attempt, family, place[:2]) for family, _, _, _, place in resolved]
    pipe = await race(attempts, config.race_delay_s, lambda pipe: pipe.aclose(flush=False))
    if pipe is None:
        raise problems[0] if problems else OSError(f"{host} has no address")
    return pipe


async def connect_spot(spot: Spot, config: SwarmConfig, *, here: Spot) -> TcpPipe:
    """Connect from a port that other connections of this process use, too.

    Args:
        spot: Where to.
        config: The limits.
        here: From where; its port was shared with :func:`share_port`, as those of all dialled connections are.

    Raises:
        OSError: If it does not answer, or the port cannot be used.
    """
    family = socket.AF_INET6 if ":" in spot.host else socket.AF_INET
    return await _connect(family, spot, config, here=here)


def share_port(unbound: socket.socket) -> None:
    """Let other sockets of this account use a socket's port as well, which is how routers are made to let peers in."""
    unbound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if hasattr(socket, "SO_REUSEPORT"):
        unbound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)


async def _connect(
    family: socket.AddressFamily, place: tuple[str, int], config: SwarmConfig, *, here: Spot | None = None
) -> TcpPipe:
    loop = asyncio.get_running_loop()
    dialled = socket.socket(family, socket.SOCK_STREAM)
    try:
        dialled.setblocking(False)
        share_port(dialled)
        if here is not None:
            dialled.bind(here)
        await loop.sock_connect(dialled, place)
    except BaseException:
        dialled.close()
        raise
    _, pipe = await loop.create_connection(TcpPipe, sock=dialled)
    try:
        pipe.tune(config)
    except OSError:
        pipe.abort()
        raise
    return pipe


def _spot(place: tuple[str, int] | None) -> Spot:
    host, port = ("", 0) if place is None else place[:2]
    return Spot(host.removeprefix("::ffff:").partition("%")[0], port)


def find_local_hosts(host: str) -> tuple[str, ...]:
    """Say under which addresses a listener bound to ``host`` can be reached from other machines, where there are any.

    Args:
        host: What it is bound to; a wildcard stands for this machine's outward addresses.
    """
    if host not in ("0.0.0.0", "::", ""):
        return (host,)
    found = tuple(dict.fromkeys(_outward_hosts(with_six=host == "::")))
    return found or (("::1",) if host == "::" else ("127.0.0.1",))


def _outward_hosts(*, with_six: bool) -> Iterator[str]:
    """Ask the routing table from where this machine would send; no packet leaves it (RFC 5737, RFC 3849)."""
    targets = [(socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")]
    for family, target in targets if with_six else targets[:1]:
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((target, 9))
                yield probe.getsockname()[0]
        except OSError:
            continue

"""From a relayed path to a direct one: two peers behind home routers dial each other at the same time.

A router lets in what looks like an answer. Each side asks a relay how it is seen, tells the other side through the
relay, and both connect from the very port that the relay has seen: whichever packet comes second finds the way open,
and TCP joins the two halves into one connection (RFC 9293, section 3.5: simultaneous open). It fails where a router
takes another port for each destination; then the relayed path stays. Owns no stream: what it finds goes to the
endpoint, for the next use.
"""

import ipaddress
import logging
import socket
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, Final

import anyio

from corolla.errors import ConfigError, Error, PeerBusy, PeerUnreachable, RemoteProtocolError
from corolla.swarm.address import RELAY, Place, format_address, split_address
from corolla.swarm.channel import Channel
from corolla.swarm.config import SwarmConfig
from corolla.swarm.endpoint import Endpoint
from corolla.swarm.finding.contacts import Contact
from corolla.swarm.reach.relayed import RelayEar
from corolla.swarm.transports.tcp import TcpListener, TcpPipe, connect_spot, share_port
from corolla.swarm.transports.tls import TlsListener, TlsStream, TlsTransport
from corolla.swarm.transports.transport import Spot, Stream
from corolla.telemetry import event, logger
from corolla.terms import Address, PeerId
from corolla.wire import Observe, Observed, Punch, Punched

if TYPE_CHECKING:
    from anyio.abc import TaskGroup

__all__ = ["Doorway", "Upgrades"]

_LOG = logger(__name__)
_ROUND_S: Final = 0.5  # for one attempt, after which the next begins with a fresh packet
_ROUNDS: Final = 12
_REST_S: Final = 0.1  # after a refusal
_MAX_AT_ONCE: Final = 8
_FORGIVE_S: Final = 10.0  # before a peer that could not be reached so is tried again; doubles up to
_MAX_FORGIVE_S: Final = 3600.0

_Take = Callable[[TcpPipe], Coroutine[Any, Any, None]]
"""Whoever is called so owns the connection."""


class _View:
    """How one connection of this peer looks from both sides; good for as long as that connection lives."""

    def __init__(self, here: Spot, seen: Spot) -> None:
        self.here = here
        self.seen = seen

    @property
    def addresses(self) -> tuple[Address, ...]:
        """Where the other side should knock: from outside, and, if it is a neighbour, at home."""
        return tuple(dict.fromkeys(format_address("tls", spot.host, spot.port) for spot in (self.seen, self.here)))

    def choose(self, addresses: Sequence[Address]) -> list[Spot]:
        """Choose where to knock: at home only of a neighbour, so that no stranger has this one knock in its own home.

        Args:
            addresses: Which the other side gave: as it is seen, and as it is at home.

        Raises:
            RemoteProtocolError: If they are none.
        """
        try:
            spots = [Spot(place.host, place.port) for place in map(split_address, addresses)]
            hosts = [ipaddress.ip_address(spot.host) for spot in spots]
        except (ConfigError, ValueError) as error:
            raise RemoteProtocolError(f"addresses to meet at came that are none: {error}") from error
        is_neighbour = bool(spots) and spots[0].host == self.seen.host
        return [spot for spot, host in zip(spots, hosts, strict=True) if is_neighbour or host.is_global]


class Doorway:
    """Lets in peers that ask, over a relayed path, for a direct one.

    Args:
        endpoint: How to reach relays.
        listener: What shakes hands with whoever comes.
        ear: Where relayed streams are served, and these will be.
    """

    def __init__(self, endpoint: Endpoint, listener: TlsListener, ear: RelayEar) -> None:
        self._endpoint = endpoint
        self._listener = listener
        self._ear = ear
        self._meeting: set[PeerId] = set()

    async def answer(self, channel: Channel, message: Punch) -> None:
        """Say where to knock, and begin to knock at the other side.

        Args:
            channel: Where the request came from.
            message: The request.

        Raises:
            PeerBusy: If too many are being met.
            PeerUnreachable: If this peer has no relay that could say how it is seen.
            Error: If the answer cannot be sent.
        """
        relays, tasks = self._ear.relays, self._ear.tasks
        if not relays or tasks is None:
            raise PeerUnreachable("this peer is not behind a relay now; dial it", peer=self._endpoint.peer_id)
        if channel.peer in self._meeting or len(self._meeting) >= _MAX_AT_ONCE:
            raise PeerBusy(f"{len(self._meeting)} peers are being met already", retry_after_s=_ROUND_S * _ROUNDS)
        self._meeting.add(channel.peer)
        stack = AsyncExitStack()
        stack.callback(self._meeting.discard, channel.peer)
        try:
            view, _ = await _look(self._endpoint, relays[0], stack)
            spots = view.choose(message.addresses)
            await channel.send(Punched(addresses=view.addresses))
        except BaseException:
            with anyio.CancelScope(shield=True):
                await stack.aclose()
            raise
        tasks.start_soon(self._meet, channel.peer, view.here, spots, stack)

    async def _meet(self, peer: PeerId, here: Spot, spots: Sequence[Spot], stack: AsyncExitStack) -> None:
        """Knock until the peer is there; what is served then goes on."""
        handler, tasks = self._ear.handler, self._ear.tasks
        if handler is None or tasks is None:
            return

        async def welcome(stream: Stream) -> None:
            if stream.peer == peer:
                scope.cancel()
            await handler(stream)

        async def serve(pipe: TcpPipe) -> None:
            tasks.start_soon(self._listener.serve_pipe, pipe, welcome)

        async with stack:
            with anyio.CancelScope() as scope:
                await _knock(here, spots, self._endpoint.config, serve)


class Upgrades:
    """Finds direct paths to peers that this one reaches through relays, in the background.

    Args:
        endpoint: How to reach peers, and who gets what is found.
        tls: What shakes hands.

    Attributes:
        found: How many direct paths it has found.
    """

    def __init__(self, endpoint: Endpoint, tls: TlsTransport) -> None:
        self._endpoint = endpoint
        self._tls = tls
        self._trying: set[PeerId] = set()
        self._reached: set[PeerId] = set()  # in this way
        self._failed: dict[PeerId, tuple[float, float]] = {}  # until when, and for how long, a peer is not tried again
        self._tasks: TaskGroup | None = None
        self.found = 0

    async def run(self) -> None:
        """Work until cancelled."""
        async with anyio.create_task_group() as self._tasks:
            await anyio.sleep_forever()

    def note(self, channel: Channel, addresses: Sequence[Address]) -> None:
        """Hear of a channel that is used, and have a direct one ready for the next use if there may be a way.

        Args:
            channel: The channel.
            addresses: Where its peer can be reached.
        """
        peer, relays = channel.peer, [address for address in addresses if address.startswith(f"{RELAY}:")]
        is_hidden = channel.path == "relayed" or peer in self._reached
        until_s, _ = self._failed.get(peer, (0.0, 0.0))
        if (
            self._tasks is not None
            and relays
            and is_hidden
            and not self._endpoint.has_direct(peer)
            and peer not in self._trying
            and len(self._trying) < _MAX_AT_ONCE
            and until_s <= anyio.current_time()
        ):
            self._trying.add(peer)
            self._tasks.start_soon(self._upgrade, peer, tuple(addresses), split_address(relays[0]))

    async def _upgrade(self, peer: PeerId, addresses: Sequence[Address], relay: Place) -> None:
        begin_s = anyio.current_time()
        try:
            stream = await self._meet(peer, addresses, relay)
            if stream is not None:
                await self._endpoint.adopt(stream)
        except PeerBusy:  # perhaps with this one's last request
            return
        except Error as error:
            event(_LOG, "no direct path was tried", level=logging.DEBUG, peer=peer[:8], reason=error.message)
            stream = None
        finally:
            self._trying.discard(peer)
        if stream is None:
            self._reached.discard(peer)
            _, before_s = self._failed.pop(peer, (0.0, _FORGIVE_S / 2))
            forgive_s = min(2 * before_s, _MAX_FORGIVE_S)
            self._failed[peer] = anyio.current_time() + forgive_s, forgive_s
            event(_LOG, "found no direct path", peer=peer[:8], again_after_s=forgive_s)
            while len(self._failed) > self._endpoint.config.max_peers:
                del self._failed[next(iter(self._failed))]
            return
        self._failed.pop(peer, None)
        self._reached.add(peer)
        self.found += 1
        event(_LOG, "found a direct path", peer=peer[:8], seconds=round(anyio.current_time() - begin_s, 3))

    async def _meet(self, peer: PeerId, addresses: Sequence[Address], relay: Place) -> TlsStream | None:
        limit_s = self._endpoint.config.handshake_s
        contact = Contact(relay.relay, (format_address("tls", relay.host, relay.port),))
        async with AsyncExitStack() as stack:
            view, outlook = await _look(self._endpoint, contact, stack)
            stack.push_async_callback(outlook.aclose)  # its port will be in use; the next attempt needs another
            async with self._endpoint.channel(peer, addresses) as channel:
                asked = Punch(addresses=view.addresses)
                answer = (await channel.request(asked, expected=Punched, deadline_s=limit_s)).message
            return await self._knock_until_one_opens(view.here, view.choose(answer.addresses), peer)

    async def _knock_until_one_opens(self, here: Spot, spots: Sequence[Spot], peer: PeerId) -> TlsStream | None:
        opened: list[TlsStream] = []

        async def shake_hands(pipe: TcpPipe) -> None:
            try:
                stream = await self._tls.dial_over(pipe, peer, format_address("tls", *pipe.ends.there))
            except PeerUnreachable:
                return
            opened.append(stream)
            scope.cancel()

        try:
            with anyio.CancelScope() as scope:
                await _knock(here, spots, self._endpoint.config, shake_hands)
        finally:
            for stream in opened[1:]:
                await stream.aclose()
        return opened[0] if opened else None


async def _look(endpoint: Endpoint, relay: Contact, stack: AsyncExitStack) -> tuple[_View, Channel]:
    """Ask a relay how a connection to it looks; the connection belongs to the stack."""
    channel = await stack.enter_async_context(endpoint.channel(relay.peer, relay.addresses))
    seen = (await channel.request(Observe(), expected=Observed, deadline_s=endpoint.config.request_s)).message
    if channel.ends is None or not seen.host:
        raise PeerUnreachable(f"relay {channel.peer[:8]} is reached through another and cannot see this peer")
    return _View(channel.ends.here, Spot(seen.host, seen.port)), channel


async def _knock(here: Spot, spots: Sequence[Spot], config: SwarmConfig, take: _Take) -> None:
    """Connect to each spot, and accept whoever connects to this one, for a while."""
    with anyio.move_on_after(_ROUND_S * _ROUNDS):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_open_door, here, config, take)
            for spot in spots:
                tasks.start_soon(_knock_at, spot, here, config, take)


async def _knock_at(spot: Spot, here: Spot, config: SwarmConfig, take: _Take) -> None:
    while True:
        pipe: TcpPipe | None = None
        try:
            with anyio.move_on_after(_ROUND_S):
                pipe = await connect_spot(spot, config, here=here)
        except OSError:
            await anyio.sleep(_REST_S)
        if pipe is not None:
            await take(pipe)
            return


async def _open_door(here: Spot, config: SwarmConfig, take: _Take) -> None:
    """Let in whose router took another port than was foreseen, where this side's router lets them pass."""
    bound = socket.socket(socket.AF_INET6 if ":" in here.host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        bound.setblocking(False)
        share_port(bound)
        bound.bind(here)
        listener = TcpListener(bound, config)
    except OSError:  # not every system lets a port be used so
        bound.close()
        return
    try:
        async with anyio.create_task_group() as tasks:
            while True:
                tasks.start_soon(take, await listener.accept())
    except OSError:
        return
    finally:
        await listener.aclose()

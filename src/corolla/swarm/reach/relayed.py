"""The two sides that a relay joins: dialling a peer behind one, and being such a peer.

Both shake hands with each other over what the relay passes on, exactly as they would over a connection of their own.
"""

import random
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Final, NamedTuple

import anyio

from corolla.errors import ConfigError, Error, PeerUnreachable, ungrouped
from corolla.swarm.address import RELAY, format_address, relay_address, split_address
from corolla.swarm.channel import Channel
from corolla.swarm.endpoint import Endpoint
from corolla.swarm.finding.contacts import Contact
from corolla.swarm.transports.tls import TlsListener, TlsStream, TlsTransport
from corolla.swarm.transports.transport import Listener, StreamHandler
from corolla.swarm.transports.tunnel import TunnelPipe
from corolla.telemetry import event, logger
from corolla.terms import Address, Claim, PeerId, Snapshot
from corolla.wire import Accept, Connect, Connected, Incoming, Ping, Pong, Reserve, Reserved, expect

if TYPE_CHECKING:
    from anyio.abc import TaskGroup

__all__ = ["RelayEar", "RelayTransport", "find_relays"]

_LOG = logger(__name__)
_LOOK_AGAIN_S: Final = 1.0
_AVOID_S: Final = 15.0  # a relay that failed
_MAX_ACCEPTING: Final = 64
_MAX_ADDRESSES: Final = 2  # of one relay


class RelayTransport:
    """Dials peers behind relays.

    Args:
        endpoint: How to reach the relays.
        tls: What shakes hands.
    """

    def __init__(self, endpoint: Endpoint, tls: TlsTransport) -> None:
        self._endpoint = endpoint
        self._tls = tls

    @property
    def scheme(self) -> str:
        """What its addresses begin with."""
        return RELAY

    async def listen(self, host: str, port: int, *, announce: Sequence[Address] = ()) -> Listener:
        """Refuse: a peer is found behind relays that it asked, by a :class:`RelayEar`.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError("a peer does not listen at a relay's address; it asks relays to be found through them")

    async def dial(self, peer: PeerId | None, address: Address) -> TlsStream:
        """Ask a relay for a peer and shake hands with it; see :meth:`corolla.swarm.Transport.dial`.

        Raises:
            PeerUnreachable: If the relay or the peer does not answer, or it is another peer; says which.
            ConfigError: If it is no address of a relay.
        """
        place = split_address(address)
        if place.relay is None:
            raise ConfigError(f"{address} is not an address of the {self.scheme} transport")
        if peer is None:
            raise PeerUnreachable(f"{address}: a relay cannot guess whom to reach; write {address}/<peer id>")
        stack = AsyncExitStack()
        limit_s = self._endpoint.config.handshake_s
        try:
            there = (format_address(self._tls.scheme, place.host, place.port),)
            channel = await stack.enter_async_context(self._endpoint.channel(place.relay, there))
            await channel.request(Connect(peer=peer), expected=Connected, deadline_s=limit_s)
        except BaseException as error:
            with anyio.CancelScope(shield=True):
                await stack.aclose()
            if isinstance(error, Error):
                raise PeerUnreachable(f"{address}: {error.message}", peer=peer) from error
            raise
        stream, received = channel.release()
        return await self._tls.dial_over(TunnelPipe(stream, received, stack.aclose), peer, address)


class _Held(NamedTuple):
    addresses: tuple[Address, ...]
    scope: anyio.CancelScope


class RelayEar:
    """A :class:`~corolla.swarm.Listener` behind relays: keeps places at some of them while it is wanted.

    Args:
        endpoint: How to reach the relays.
        listener: What shakes hands with whoever comes.
        find: Gives the relays that are known now.
        rng: The dice that choose among them.

    Attributes:
        handler: What streams go to, while it serves.
        tasks: Where they are served.
    """

    def __init__(
        self, endpoint: Endpoint, listener: TlsListener, find: Callable[[], Sequence[Contact]], *, rng: random.Random
    ) -> None:
        self._endpoint = endpoint
        self._config = endpoint.config
        self._listener = listener
        self._find = find
        self._rng = rng
        self._held: dict[PeerId, _Held] = {}
        self._asked: set[PeerId] = set()
        self._avoided_s: dict[PeerId, float] = {}
        self._accepting = 0
        self._is_wanted = False
        self.handler: StreamHandler | None = None
        self.tasks: TaskGroup | None = None
        self._changed = anyio.Event()

    @property
    def addresses(self) -> tuple[Address, ...]:
        """Where it can be reached now."""
        return tuple(address for held in self._held.values() for address in held.addresses)

    @property
    def relays(self) -> list[Contact]:
        """Give the relays where it has a place now."""
        return [contact for contact in self._find() if contact.peer in self._held]

    def want(self, is_wanted: bool) -> None:
        """Have places at relays, or give them up."""
        if is_wanted != self._is_wanted:
            self._is_wanted = is_wanted
            self._ring()

    async def wait(self) -> None:
        """Wait until something about its addresses changes."""
        await self._changed.wait()

    async def serve(self, handler: StreamHandler) -> None:
        """Keep places and accept streams until cancelled; see :meth:`corolla.swarm.Listener.serve`."""
        async with anyio.create_task_group() as tasks:
            self.handler, self.tasks = handler, tasks
            while True:
                changed = self._changed
                if self._is_wanted:
                    for contact in await self._choose():
                        tasks.start_soon(self._hold, contact, handler, tasks)
                else:
                    for held in self._held.values():
                        held.scope.cancel()
                with anyio.move_on_after(_LOOK_AGAIN_S):
                    await changed.wait()

    async def aclose(self) -> None:
        """Do nothing: what it has ends with :meth:`serve`."""

    async def _choose(self) -> list[Contact]:
        """Choose relays to ask: of a few that the dice name, the nearest."""
        needed = self._config.relays - len(self._asked)
        now_s = anyio.current_time()
        known = [
            contact
            for contact in self._find()
            if contact.peer is not None
            and contact.peer not in self._asked
            and self._avoided_s.get(contact.peer, 0.0) <= now_s
        ]
        if needed <= 0 or not known:
            return []
        few = self._rng.sample(known, min(2 * self._config.relays, len(known)))
        answered: list[Contact] = []
        async with anyio.create_task_group() as tasks:
            for contact in few:
                tasks.start_soon(self._ping, contact, answered)
        chosen = answered[:needed]
        self._asked |= {contact.peer for contact in chosen if contact.peer is not None}
        return chosen

    async def _ping(self, contact: Contact, answered: list[Contact]) -> None:
        """Put a relay into the list when it answers, so that the list has the nearest first."""
        if contact.peer is None:
            return
        try:
            async with self._endpoint.channel(contact.peer, contact.addresses) as channel:
                await channel.request(Ping(), expected=Pong, deadline_s=self._config.request_s)
        except Error as error:
            self._avoid(contact.peer, error)
        else:
            answered.append(contact)

    def _avoid(self, relay: PeerId, error: Error) -> None:
        event(_LOG, "relay failed", relay=relay[:8], reason=error.message)
        now_s = anyio.current_time()
        self._avoided_s = {peer: until_s for peer, until_s in self._avoided_s.items() if until_s > now_s}
        self._avoided_s[relay] = now_s + _AVOID_S

    async def _hold(self, contact: Contact, handler: StreamHandler, streams: "TaskGroup") -> None:
        """Have a place at a relay until it is lost, or not wanted any more."""
        if contact.peer is None:
            return
        try:
            with ungrouped(), anyio.CancelScope() as scope:
                async with self._endpoint.channel(contact.peer, contact.addresses) as channel:
                    await channel.request(Reserve(), expected=Reserved, deadline_s=self._config.request_s)
                    found = tuple(relay_address(address, contact.peer) for address in contact.addresses)
                    self._held[contact.peer] = _Held(found[:_MAX_ADDRESSES], scope)
                    self._ring()
                    event(_LOG, "found through a relay", relay=contact.peer[:8], address=found[0])
                    await self._listen(channel, lambda offer: streams.start_soon(self._accept, contact, offer, handler))
        except Error as error:
            self._avoid(contact.peer, error)
        finally:
            self._held.pop(contact.peer, None)
            self._asked.discard(contact.peer)
            self._ring()

    async def _listen(self, channel: Channel, take: Callable[[Incoming], object]) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._ping_often, channel)
            while True:
                received = await channel.receive(deadline_s=self._config.lost_after_s)
                if not isinstance(received.message, Pong):
                    offer = expect(received.message, Incoming, peer=channel.peer)
                    if self._accepting < _MAX_ACCEPTING:
                        take(offer)

    async def _ping_often(self, channel: Channel) -> None:
        while True:
            await anyio.sleep(self._config.heartbeat_s)
            await channel.send(Ping(), deadline_s=self._config.lost_after_s)

    async def _accept(self, contact: Contact, offer: Incoming, handler: StreamHandler) -> None:
        """Take up an offer; what is served then may outlive the place at the relay."""
        try:
            async with self._endpoint.channel(contact.peer, contact.addresses) as channel:
                self._accepting += 1
                try:
                    limit_s = self._config.handshake_s
                    await channel.request(Accept(ticket=offer.ticket), expected=Connected, deadline_s=limit_s)
                finally:
                    self._accepting -= 1
                stream, received = channel.release()
                await self._listener.serve_pipe(TunnelPipe(stream, received, channel.aclose), handler)
        except Error as error:
            event(_LOG, "could not take up an offer of a relay", peer=offer.peer[:8], reason=error.message)

    def _ring(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()


def find_relays(snapshot: Snapshot, *, but: PeerId) -> list[Contact]:
    """List the peers that offer to be relays, and where to dial them.

    Args:
        snapshot: What is known of the swarm.
        but: Whom to leave out: this peer itself.
    """
    offers: list[Claim] = [*snapshot.relay_offers, *(server for server in snapshot.announcements if server.is_relay)]
    found = []
    for offer in offers:
        direct = tuple(address for address in offer.addresses if not address.startswith(f"{RELAY}:"))
        if direct and offer.peer != but:
            found.append(Contact(offer.peer, direct))
    return found

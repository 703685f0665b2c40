"""How one peer is reached, and helps others to be: what belongs together of relays, dialling back and upgrades.

Knows which message goes to which of them, and nothing else.
"""

import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

import anyio

from corolla.errors import PeerFailed, RemoteProtocolError
from corolla.swarm.channel import Channel
from corolla.swarm.config import RelayConfig
from corolla.swarm.endpoint import Endpoint
from corolla.swarm.finding.contacts import Contact, Contacts
from corolla.swarm.reach.punch import Doorway, Upgrades
from corolla.swarm.reach.reachability import DialBacks, Reachability, Verdict, find_askable, observe
from corolla.swarm.reach.relay import Relay, RelayLoad
from corolla.swarm.reach.relayed import RelayEar, RelayTransport, find_relays
from corolla.swarm.transports.tls import TlsListener, TlsTransport
from corolla.swarm.transports.transport import Listener, Transport
from corolla.terms import Address, Claim, Snapshot
from corolla.wire import Accept, Connect, DialBack, Observe, Punch, ReachMessage, Reserve

_Part = TypeVar("_Part")

__all__ = ["Reach", "dial_through_relays"]


def dial_through_relays(endpoint: Endpoint, transport: Transport) -> Upgrades | None:
    """Let an endpoint dial peers behind relays, and find direct paths to them.

    Args:
        endpoint: Whose.
        transport: Its way to dial others.

    Returns:
        What finds the direct paths, to be run; ``None`` if the transport is not TLS, which all of this needs.
    """
    if not isinstance(transport, TlsTransport):
        return None
    endpoint.add_transport(RelayTransport(endpoint, transport))
    upgrades = Upgrades(endpoint, transport)
    endpoint.on_use = upgrades.note
    return upgrades


class Reach:
    """How a peer that listens is reached.

    Args:
        endpoint: Whose reach it is.
        transport: The way by which it listens.
        relay: What it does for others.
        snapshot: Gives what is known of the swarm.
        contacts: Whom else to ask.
        rng: The dice.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        transport: Transport,
        relay: RelayConfig,
        *,
        snapshot: Callable[[], Snapshot],
        contacts: Contacts,
        rng: random.Random,
    ) -> None:
        self._endpoint = endpoint
        self._tls = transport if isinstance(transport, TlsTransport) else None
        self._snapshot = snapshot
        self._contacts = contacts
        self._rng = rng
        self._upgrades = dial_through_relays(endpoint, transport)
        self._relay = Relay(relay, lost_after_s=endpoint.config.lost_after_s) if relay.enabled else None
        self._dial_backs = None if self._tls is None else DialBacks(self._tls)
        self._reachability: Reachability | None = None
        self._doorway: Doorway | None = None

    @property
    def verdict(self) -> Verdict:
        """Whether this peer can be dialled."""
        return "unknown" if self._reachability is None else self._reachability.verdict

    @property
    def relay_load(self) -> RelayLoad | None:
        """What it does for others; ``None`` if it is no relay."""
        return None if self._relay is None else self._relay.load

    def watch(self, listener: Listener, host: str) -> None:
        """Have the addresses of an ear be such that others can use them, once this runs.

        Args:
            listener: The ear; only one of TLS is looked after.
            host: Where it listens on this machine.
        """
        if not isinstance(listener, TlsListener):
            return
        ear = RelayEar(self._endpoint, listener, self._find_relays, rng=self._rng)
        self._endpoint.add_listener(ear)
        self._doorway = Doorway(self._endpoint, listener, ear)
        self._reachability = Reachability(
            self._endpoint, listener, host, ear=ear, find=self._find_askable, rng=self._rng
        )

    async def run(self, tell: Callable[[tuple[Address, ...]], Awaitable[None]]) -> None:
        """Work until cancelled.

        Args:
            tell: Hears of this peer's addresses when they change.
        """
        async with anyio.create_task_group() as tasks:
            if self._upgrades is not None:
                tasks.start_soon(self._upgrades.run)
            if self._reachability is not None:
                tasks.start_soon(self._reachability.run, tell)

    async def handle(self, channel: Channel, message: ReachMessage) -> None:
        """Answer another peer.

        Args:
            channel: Where the message came from.
            message: What it asks.

        Raises:
            RemoteProtocolError: If it asks nothing.
            PeerError: If it cannot be done; says why.
            Error: If the answer cannot be sent.
        """
        match message:
            case Observe():
                await channel.send(observe(channel))
            case DialBack():
                await _offered(self._dial_backs).answer(channel, message)
            case Punch():
                await _offered(self._doorway).answer(channel, message)
            case Reserve() | Connect() | Accept():
                await _offered(self._relay).handle(channel, message)
            case _:
                raise RemoteProtocolError(f"{type(message).__name__} asks nothing")

    def _find_relays(self) -> list[Contact]:
        return find_relays(self._snapshot(), but=self._endpoint.peer_id)

    def _find_askable(self) -> list[Contact]:
        """List whom to ask: those that announce something, and those that this peer was told of."""
        snapshot, own = self._snapshot(), self._endpoint.peer_id
        claims: list[Claim] = [*snapshot.announcements, *snapshot.relay_offers]
        known = [Contact(claim.peer, claim.addresses) for claim in claims if claim.peer != own]
        named = {address for contact in known for address in contact.addresses}
        told = [contact for contact in self._contacts.all() if not named & set(contact.addresses)]
        return find_askable([*known, *told], self._endpoint.addresses)


def _offered(part: _Part | None) -> _Part:
    if part is None:
        raise PeerFailed("this peer was asked for what it does not do: it is no relay, or does not listen for others")
    return part

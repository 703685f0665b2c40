"""A swarm's gossip without sockets or clocks: the code of real servers under simulated time, counted to the byte.

Owns the clock and the ways between peers. Two things are cheaper than in life, and change nothing that is said: each
signature is verified once and not once per server, and, in very large swarms, only some servers announce themselves
(``tracked``). Each announcement travels by itself, so all would cost ``servers / tracked`` times as much.
"""

import heapq
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from corolla.errors import Error, PeerLost, PeerUnreachable
from corolla.swarm import Contact, Contacts, Directory, Identity, SwarmConfig
from corolla.swarm.directory.entry import Entry
from corolla.swarm.directory.exchange import Exchange
from corolla.swarm.directory.neighbours import Neighbours, Visit
from corolla.swarm.directory.pace import refresh_s
from corolla.swarm.directory.stamps import Body
from corolla.swarm.directory.voice import Voice
from corolla.terms import Address, Announcement, Claim, ModelId, PeerId, Span, Speed
from corolla.wire import News, Record, Stamp, encode_message

if TYPE_CHECKING:
    from corolla.swarm.directory.link import Link

__all__ = ["SimulatedServer", "SimulatedSwarm", "Traffic", "usual_announcement"]

_TICK_S: Final = 0.5
_GATHER_S: Final = 0.005
_HANDSHAKE_BYTES: Final = 1500  # of TLS 1.3, each way
_MESSAGE_BYTES: Final = 20 + 22 + 52 + 26  # head of the frame; of the TLS record; TCP/IP; half an acknowledgement
_EMPTY_BYTES: Final = len(encode_message(News()))
_SEGMENT_BYTES: Final = 52 + 26
_SEGMENT_HOLDS_BYTES: Final = 1400
_BEGAN_S: Final = 1.7e9  # what the clocks on the walls show at time 0


def usual_announcement(peer: PeerId, addresses: tuple[Address, ...], sessions: int, *, ttl_s: float) -> Announcement:
    """Give an announcement that is as long as most are, of a server of part of a large model.

    Args:
        peer: Whose.
        addresses: Where that is dialled.
        sessions: How many it has.
        ttl_s: How long the announcement holds.
    """
    return Announcement(
        peer=peer,
        sequence=0,
        ttl_s=ttl_s,
        model=ModelId("ab" * 32),
        model_name="a-model/of-some-length",
        num_blocks=80,
        span=Span(0, 16),
        state="online",
        precision="bfloat16",
        addresses=addresses,
        speed=Speed(decode_tokens_per_s=123.4, prefill_tokens_per_s=5678.9),
        free_tokens=max(0, 20_000 - 1500 * sessions),
        sessions=sessions,
        version="0.1.0",
    )


@dataclass(slots=True)
class Traffic:
    """Bytes that one server sent.

    Args:
        said: About announcements: names, records, suspicions, sums. It grows with what is announced.
        spent: Around it: heads, segments, acknowledgements, handshakes, signs of life. It grows with links.
    """

    said: int = 0
    spent: int = 0


class _SharedDirectory(Directory):
    """Reads and verifies each record once for the whole swarm, and counts those who announce nothing."""

    def __init__(self, swarm: "SimulatedSwarm", wall_s: Callable[[], float]) -> None:
        super().__init__(swarm.config, wall_s=wall_s)
        self._swarm = swarm

    def count(self, now_s: float) -> int:
        """Count the servers that are seen, and as many more for each as are not tracked."""
        return round(super().count(now_s) * self._swarm.share)

    def _read(self, record: Record, stamp: Stamp, body: Body | None) -> tuple[Body | None, Claim | None]:
        known = self._swarm.read.get(record.signature)
        if known is None:
            known = self._swarm.read[record.signature] = super()._read(record, stamp, body)
        return known

    def _is_genuine(self, record: Record, stamp: Stamp) -> bool:
        if record.signature not in self._swarm.genuine:
            self._swarm.genuine[record.signature] = super()._is_genuine(record, stamp)
        return self._swarm.genuine[record.signature]


class _SharedNeighbours(Neighbours):
    """Links to servers that announce nothing as well."""

    swarm: "SimulatedSwarm"

    def candidates(self, live: Sequence[Entry]) -> list[Contact]:
        if self.swarm.share == 1:
            return super().candidates(live)
        return [server.contact for server in self.swarm.rng.sample(self.swarm.servers, 8)]


@dataclass(eq=False)
class SimulatedServer:
    """One server of a simulated swarm.

    Args:
        identity: Who it is.
        directory: What it knows.
        exchange: What it says to neighbours.
        voice: What it says of itself.
        contact: How others find it.
    """

    identity: Identity
    directory: Directory
    exchange: Exchange
    voice: Voice
    contact: Contact
    traffic: Traffic = field(default_factory=Traffic)
    is_alive: bool = True
    sessions: int = 0

    def announcement(self) -> Announcement:
        """Give what is so now."""
        return usual_announcement(self.identity.peer_id, self.contact.addresses, self.sessions, ttl_s=20.0)


class _Way:
    """One link, both ends: says what waits to be said, and brings it after a while."""

    def __init__(self, swarm: "SimulatedSwarm", ends: tuple[SimulatedServer, SimulatedServer], delay_s: float) -> None:
        self._swarm = swarm
        self._ends = ends
        self._delay_s = delay_s
        self._due: list[float] = [0.0, 0.0]
        self.is_open = True
        near, far = ends
        now_s = swarm.now_s
        self.links: list[Link] = [
            near.exchange.open(far.identity.peer_id, now_s, partial(self._wake, 0), is_ours=True),
            far.exchange.open(near.identity.peer_id, now_s, partial(self._wake, 1), is_ours=False),
        ]
        for side in (0, 1):
            self._schedule(side, now_s)

    def touches(self, server: SimulatedServer) -> bool:
        return server in self._ends

    def cut(self, error: Error | None) -> None:
        if self.is_open:
            self.is_open = False
            for server, link in zip(self._ends, self.links, strict=True):
                server.exchange.close(link, self._swarm.now_s, error)

    def _wake(self, side: int) -> None:
        self._schedule(side, self._swarm.now_s + _GATHER_S)

    def _schedule(self, side: int, at_s: float) -> None:
        if not self._due[side] or at_s < self._due[side]:
            self._due[side] = at_s
            self._swarm.at(at_s, partial(self._say, side, at_s))

    def _say(self, side: int, at_s: float) -> None:
        server, link = self._ends[side], self.links[side]
        if not self.is_open or self._due[side] != at_s:
            return
        self._due[side] = 0.0
        message = server.exchange.say(link, at_s)
        size = len(encode_message(message))
        segments = size // _SEGMENT_HOLDS_BYTES
        server.traffic.said += size - _EMPTY_BYTES
        server.traffic.spent += _MESSAGE_BYTES + _EMPTY_BYTES + segments * _SEGMENT_BYTES
        self._swarm.at(at_s + self._delay_s, partial(self._hear, 1 - side, message))
        if not message.is_last:
            self._schedule(side, at_s + self._swarm.config.heartbeat_s)

    def _hear(self, side: int, message: News) -> None:
        server, link, now_s = self._ends[side], self.links[side], self._swarm.now_s
        if not self.is_open:
            return
        server.exchange.hear(link, message, now_s)
        for record in message.records:
            if server.exchange.take(link, record, now_s) == "new":
                self._swarm.note_arrival(record)
        server.exchange.settle(link, now_s)
        if message.is_last:
            self.cut(None)


class SimulatedSwarm:
    """Servers that gossip under simulated time.

    Args:
        servers: How many.
        tracked: How many of them announce themselves; ``None`` for all.
        config: Their settings.
        seed: Of all dice.
        delay_s: The shortest and the longest way from one to another, in seconds.
        clock_error_s: By how much a clock on a wall may be wrong.

    Attributes:
        now_s: The simulated time.
        servers: All of them.
        arrivals: For each stamp that is watched, when it came to each server.
    """

    def __init__(
        self,
        servers: int,
        *,
        tracked: int | None = None,
        config: SwarmConfig | None = None,
        seed: int = 0,
        delay_s: tuple[float, float] = (0.01, 0.1),
        clock_error_s: float = 0.0,
    ) -> None:
        self.config = config or SwarmConfig()
        self.rng = random.Random(seed)
        self.now_s = 0.0
        self.share = servers / (tracked or servers)
        self.genuine: dict[bytes, bool] = {}
        self.read: dict[bytes, tuple[Body | None, Claim | None]] = {}
        self.arrivals: dict[bytes, list[float]] = {}
        self._delay_s = delay_s
        self._clock_error_s = clock_error_s
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._ways: set[_Way] = set()
        self._walls: dict[PeerId, tuple[int, int]] = {}
        self.servers: list[SimulatedServer] = []
        self._by_peer: dict[PeerId, SimulatedServer] = {}
        self.cut_off: set[PeerId] = set()
        for number in range(servers):
            self.add(announces=number < (tracked or servers))

    def add(
        self,
        *,
        announces: bool = True,
        contacts: tuple[str, ...] = (),
        identity: Identity | None = None,
        clock_error_s: float | None = None,
    ) -> SimulatedServer:
        """Have one more server, which knows its contacts and nothing else.

        Args:
            announces: Whether it announces itself.
            contacts: Addresses.
            identity: Who it is; ``None`` for someone new.
            clock_error_s: By how much its clock is wrong; ``None`` to let the dice say.
        """
        identity = identity or Identity(Ed25519PrivateKey.from_private_bytes(self.rng.randbytes(32)))
        error_s = (
            self.rng.uniform(-self._clock_error_s, self._clock_error_s) if clock_error_s is None else clock_error_s
        )

        def wall_s() -> float:
            return _BEGAN_S + self.now_s + error_s

        directory = _SharedDirectory(self, wall_s)
        neighbours = _SharedNeighbours(directory, identity.peer_id, Contacts(contacts), self.config, self.rng)
        neighbours.swarm = self
        exchange = Exchange(directory, identity, neighbours, self.config, self.rng)
        voice = Voice(directory, identity, self.config, wall_s, self.rng)
        address = Address(f"tls://server-{len(self.servers)}.example:31330")
        contact = Contact(identity.peer_id, (address,))
        server = SimulatedServer(identity, directory, exchange, voice, contact)
        self.servers.append(server)
        self._by_peer[identity.peer_id] = server
        if announces:
            self.at(self.now_s, partial(self._announce, server))
        self.at(self.now_s + self.rng.uniform(0, _TICK_S), partial(self._tick, server))
        return server

    def at(self, at_s: float, do: Callable[[], None]) -> None:
        """Have something done at a time."""
        heapq.heappush(self._events, (at_s, next(self._numbers), do))

    def run(self, seconds: float) -> None:
        """Let time pass."""
        end_s = self.now_s + seconds
        while self._events and self._events[0][0] <= end_s:
            self.now_s, _, do = heapq.heappop(self._events)
            do()
        self.now_s = end_s

    def acquaint(self) -> None:
        """Let everyone know what anyone has announced, at once and for free, as after a long time together."""
        records = [
            entry.as_record(self.now_s, has_body=True)
            for server in self.servers
            for entry in [self._own(server)]
            if entry
        ]
        for server in self.servers:
            for record in records:
                server.directory.merge(record, self.now_s)
        for server in self.servers:
            server.voice._due_s = self.now_s + self.rng.uniform(0.0, refresh_s(self.config, len(self.servers)))

    def kill(self, server: SimulatedServer) -> None:
        """Let a server vanish, whose connections break."""
        server.is_alive = False
        for way in [way for way in self._ways if way.touches(server)]:
            self._ways.discard(way)
            way.cut(PeerLost("it was killed", peer=server.identity.peer_id))

    def part(self, servers: set[PeerId]) -> None:
        """Cut the ways between some servers and all others; none to mend all."""
        self.cut_off = servers
        for way in [way for way in self._ways if len({end.identity.peer_id in servers for end in way._ends}) > 1]:
            self._ways.discard(way)
            way.cut(PeerLost("the network was cut"))

    def watch(self, server: SimulatedServer) -> bytes:
        """Have the arrivals of a server's newest stamp noted, from now on."""
        entry = self._own(server)
        if entry is None:
            raise ValueError("it has announced nothing")
        self.arrivals[entry.id] = []
        return entry.id

    def note_arrival(self, record: Record) -> None:
        """Take note of when a stamp came, if it is watched."""
        if (times := self.arrivals.get(record.signature[:8])) is not None:
            times.append(self.now_s)

    def change(self, server: SimulatedServer, sessions: int) -> bool:
        """Let a server's load change; say whether it told others at once."""
        server.sessions = sessions
        entry = server.voice.note(server.announcement(), self.now_s)
        if entry is not None:
            server.exchange.announced(entry)
        return entry is not None

    def _own(self, server: SimulatedServer) -> Entry | None:
        return server.directory.entry(server.identity.peer_id)

    def _announce(self, server: SimulatedServer) -> None:
        entry = server.voice.announce(server.announcement(), self.now_s)
        if entry is not None:
            server.exchange.announced(entry)

    def _tick(self, server: SimulatedServer) -> None:
        if not server.is_alive:
            return
        if (entry := server.voice.refresh(self.now_s)) is not None:
            server.exchange.announced(entry)
        for visit in server.exchange.tick(self.now_s):
            self._visit(server, visit)
        self.at(self.now_s + _TICK_S, partial(self._tick, server))

    def _visit(self, server: SimulatedServer, visit: Visit) -> None:
        other = self._by_peer.get(visit.contact.peer) if visit.contact.peer else self._at_address(visit.contact)
        delay_s = self.rng.uniform(*self._delay_s)
        server.traffic.spent += _HANDSHAKE_BYTES

        def arrive() -> None:
            same_side = (
                other is not None and len({one.identity.peer_id in self.cut_off for one in (server, other)}) == 1
            )
            if other is None or not other.is_alive or not server.is_alive or not same_side:
                server.exchange.visited(visit, self.now_s, PeerUnreachable("nobody is there", peer=visit.contact.peer))
                return
            other.traffic.spent += _HANDSHAKE_BYTES
            server.exchange.visited(visit, self.now_s, None)
            if not visit.is_probe and other is not server:
                self._ways.add(_Way(self, (server, other), delay_s))

        self.at(self.now_s + 4 * delay_s, arrive)

    def _at_address(self, contact: Contact) -> SimulatedServer | None:
        return next((one for one in self.servers if set(one.contact.addresses) & set(contact.addresses)), None)

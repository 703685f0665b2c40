"""A swarm in simulated time, for what real ones are too large and too slow: do servers that decide alone balance it?

Owns a clock of its own and what a server would do by it; what it decides is decided by ``corolla.routing``, by the very
functions that real servers call. No server computes anything here.
"""

import heapq
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import msgspec

from corolla.routing import Layout, Move, PlacementConfig, Sizes, confirm_move, find_moves, find_span, read_layout
from corolla.terms import Announcement, ModelId, PeerId, ServerState, Snapshot, Span, Speed

__all__ = ["Pace", "SimulatedServer", "SimulatedSwarm", "throughput_bound"]

_MODEL = ModelId("0" * 64)
_LETTERS = "abcdefghijklmnopqrstuvwxyz234567"
_ROUNDS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How long things take in a simulated swarm, in seconds.

    Args:
        look_s: A server thinks about moving this often, give or take half.
        settle_s: It leaves so long after it has announced a move.
        spread_s: What it sees of the others is up to so old.
        expire_s: A server that died is seen for so long.
        drain_s: It finishes its sessions.
        load_s: It loads the whole model in this time, and a span in a part of it.
    """

    look_s: float = 10.0
    settle_s: float = 4.0
    spread_s: float = 2.0
    expire_s: float = 20.0
    drain_s: float = 30.0
    load_s: float = 600.0


@dataclass(slots=True)
class SimulatedServer:
    """One server.

    Attributes:
        claim: What it announces.
        power: Its speed: the tokens a second of a span, times the span's bytes.
        room_bytes: What it can hold.
        is_alive: Whether it has not died.
        is_measured: Whether it knows its speed.
    """

    claim: Announcement
    power: float
    room_bytes: int
    is_alive: bool = True
    is_measured: bool = False

    @property
    def is_online(self) -> bool:
        """Whether it really serves its span now."""
        return self.is_alive and self.claim.state == "online"


@dataclass(order=True, slots=True)
class _Event:
    at_s: float
    number: int
    act: Callable[[], None] = field(compare=False)


class SimulatedSwarm:
    """Servers of one model that join, die, and move as they see fit.

    Args:
        sizes: The bytes of each of the model's blocks.
        rng: The dice.
        pace: How long things take.
        config: What a move must be worth.

    Attributes:
        now_s: The time.
        servers: Everybody whose announcement has not expired.
        moves: How many servers have set out for another span.
        holes_opened: How many blocks have lost their last server because it moved.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        rng: random.Random,
        *,
        pace: Pace | None = None,
        config: PlacementConfig | None = None,
    ) -> None:
        self.now_s = 0.0
        self.servers: dict[PeerId, SimulatedServer] = {}
        self.moves = 0
        self.holes_opened = 0
        self._raw_sizes = tuple(sizes)
        self._sizes = Sizes(sizes)
        self._rng = rng
        self._pace = pace or Pace()
        self._config = config or PlacementConfig()
        self._events: list[_Event] = []
        self._number = 0
        self._revision = 0
        self._view: tuple[float, int, Snapshot] = (-math.inf, -1, Snapshot(announcements=()))
        self._read: tuple[int, Layout] | None = None
        self._plan: tuple[int, dict[PeerId, Move]] = (-1, {})

    def join(self, power: float, room_bytes: int, *, is_loaded: bool = False) -> SimulatedServer:
        """Let a server join where it is needed most.

        Args:
            power: Its speed.
            room_bytes: What it can hold.
            is_loaded: Whether it is online at once.
        """
        span = find_span(self._layout(), room_bytes, self._config)
        return self.put(power, span, room_bytes=room_bytes, is_loaded=is_loaded)

    def put(self, power: float, span: Span, *, room_bytes: int, is_loaded: bool = True) -> SimulatedServer:
        """Let a server join at a span."""
        self._number += 1
        number = self._number * 0x9E3779B1 % 2**32  # ids in no order
        claim = Announcement(
            peer=PeerId("".join(_LETTERS[number >> 5 * place & 31] for place in range(7)).ljust(52, "a")),
            sequence=0,
            ttl_s=self._pace.expire_s,
            model=_MODEL,
            model_name="",
            num_blocks=len(self._sizes),
            span=span,
            state="online" if is_loaded else "joining",
            precision="float32",
            addresses=(),
        )
        server = SimulatedServer(claim, power, room_bytes, is_measured=is_loaded)
        self.servers[claim.peer] = server
        self._say(server, state=claim.state, span=span)
        if not is_loaded:
            self._at(self._load_s(span), lambda: self._arrive(server))
        self._at(self._pace.look_s * self._rng.uniform(0.0, 1.5), lambda: self._look(server))
        return server

    def kill(self, server: SimulatedServer) -> None:
        """Let a server die; the others see it until its announcement expires."""
        server.is_alive = False

        def expire() -> None:
            del self.servers[server.claim.peer]
            self._revision += 1

        self._at(self._pace.expire_s, expire)

    def run(self, seconds: float) -> None:
        """Let time pass."""
        until_s = self.now_s + seconds
        while self._events and self._events[0].at_s <= until_s:
            event = heapq.heappop(self._events)
            self.now_s = event.at_s
            event.act()
        self.now_s = until_s

    @property
    def online(self) -> list[SimulatedServer]:
        """The servers that really serve now."""
        return [server for server in self.servers.values() if server.is_online]

    @property
    def throughput(self) -> float:
        """The tokens a second of the weakest block."""
        rates = [0.0] * len(self._sizes)
        for server in self.online:
            span = server.claim.span
            for block in span.indices:
                rates[block] += server.power / self._sizes.between(span.start, span.stop)
        return min(rates)

    @property
    def bound(self) -> float:
        """More than this the servers that are alive could not do, wherever they were."""
        alive = [(server.power, server.room_bytes) for server in self.servers.values() if server.is_alive]
        return throughput_bound(self._sizes, alive)

    def _look(self, server: SimulatedServer) -> None:
        if not server.is_alive:
            return
        self._at(self._pace.look_s * self._rng.uniform(0.5, 1.5), lambda: self._look(server))
        claim = server.claim
        if claim.state != "online" or claim.next_span is not None:
            return
        move = self._planned().get(claim.peer)
        if move is not None:
            self._say(server, state="online", span=claim.span, next_span=move.span)
            self._at(self._pace.settle_s, partial(self._set_out, server, move))

    def _set_out(self, server: SimulatedServer, move: Move) -> None:
        if not server.is_alive:
            return
        here = server.claim.span
        if not confirm_move(self._snapshot(), _MODEL, self._raw_sizes, move):
            self._say(server, state="online", span=here)
            return
        self.moves += 1
        online = [other.claim.span for other in self.online if other is not server]
        self.holes_opened += sum(not any(block in span for span in online) for block in here.indices)
        self._say(server, state="draining", span=here, next_span=move.span)
        self._at(self._pace.drain_s, lambda: self._say(server, state="joining", span=move.span))
        self._at(self._pace.drain_s + self._load_s(move.span), lambda: self._arrive(server))

    def _arrive(self, server: SimulatedServer) -> None:
        server.is_measured = True
        self._say(server, state="online", span=server.claim.span)

    def _say(self, server: SimulatedServer, *, state: ServerState, span: Span, next_span: Span | None = None) -> None:
        if not server.is_alive:
            return
        self._revision += 1
        rate = server.power / self._sizes.between(span.start, span.stop)
        server.claim = msgspec.structs.replace(
            server.claim,
            state=state,
            span=span,
            next_span=next_span,
            move_s=self._pace.drain_s + self._load_s(span),
            speed=Speed(decode_tokens_per_s=rate, prefill_tokens_per_s=rate) if server.is_measured else None,
        )

    def _load_s(self, span: Span) -> float:
        return self._pace.load_s * self._sizes.between(span.start, span.stop) / self._sizes.total

    def _snapshot(self) -> Snapshot:
        made_s, revision, snapshot = self._view
        if revision != self._revision and self.now_s - made_s >= self._pace.spread_s:
            snapshot = Snapshot(announcements=tuple(server.claim for server in self.servers.values()))
            self._view = self.now_s, self._revision, snapshot
        return snapshot

    def _layout(self) -> Layout:
        """Read the view once for all who look at it."""
        snapshot = self._snapshot()
        if self._read is None or self._read[0] != self._view[1]:
            self._read = self._view[1], read_layout(snapshot, _MODEL, self._sizes, self._config.max_claim)
        return self._read[1]

    def _planned(self) -> dict[PeerId, Move]:
        """Plan once for all who look before anything changes: from the same view all of them plan the same."""
        layout = self._layout()
        if self._plan[0] != self._view[1]:
            self._plan = self._view[1], {move.peer: move for move in find_moves(layout, self._config)}
        return self._plan[1]

    def _at(self, after_s: float, act: Callable[[], None]) -> None:
        self._number += 1
        heapq.heappush(self._events, _Event(self.now_s + after_s, self._number, act))


def throughput_bound(sizes: Sizes, servers: Iterable[tuple[float, int]], rounds: int = _ROUNDS) -> float:
    """Bound the throughput of the weakest block over all placements of some servers.

    Whatever weights the blocks are given, no placement does better than if every server stood where the weights add up
    to most; the weights are then raised where the throughput is low (multiplicative weights: Arora, Hazan and Kale,
    2012), which in the limit gives the optimum of the linear program in which servers may be divided over spans.

    Args:
        sizes: The model's blocks.
        servers: Power and room of each.
        rounds: How often the weights are corrected.
    """
    powers: dict[int, float] = {}
    for power, room_bytes in servers:
        powers[room_bytes] = powers.get(room_bytes, 0.0) + power
    if not powers:
        return 0.0
    count, best = len(sizes), math.inf
    sums = [0.0] * count
    level = sum(powers.values()) / sizes.total
    for number in range(1, rounds + 1):
        least, sharpness = min(sums), 8.0 / (level * math.sqrt(number))
        weights = [0.0]
        for done in sums:
            weights.append(weights[-1] + math.exp((least - done) * sharpness))
        changes, value = [0.0] * (count + 1), 0.0
        for room_bytes, power in powers.items():
            windows = sizes.windows(room_bytes)
            worth, start, stop, size = max(
                ((weights[b] - weights[a]) / bytes_, a, b, bytes_) for a, b, bytes_ in windows
            )
            value += worth * power
            changes[start] += power / size
            changes[stop] -= power / size
        best = min(best, value / weights[-1])
        rate = 0.0
        for block in range(count):
            rate += changes[block]
            sums[block] += rate
    return best

"""Which span a server should take, and when it should take another. Pure: decisions over a snapshot, nobody is moved.

How much the swarm *needs* a block falls exponentially with the throughput that it has; a server is worth as much as the
need that it takes away. ``docs/placement.md`` has the formula and what it achieves. Every server decides for the whole
swarm, by the same rules, from nearly the same snapshot, and does only its own part: so no coordinator is needed.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, permutations
from typing import NamedTuple

from corolla.routing.layout import Layout, Seat, Sizes, read_layout
from corolla.terms import ModelId, PeerId, Snapshot, Span

__all__ = [
    "Move",
    "PlacementConfig",
    "choose_span",
    "claims_before",
    "confirm_move",
    "find_moves",
    "find_span",
    "plan_moves",
]

_DIGITS = 9
"""Needs that differ by less are equal: sums depend on the order of their terms."""
_FINER = 8.0
"""Once no move helps by the sharpness of the settings, moves are sought that help by one so many times as high."""
_MANY = 256
"""In swarms of more servers than this, only some are looked at closely: those that a quick look finds the best to
move."""
_SHORTLIST = 48
"""So many of them."""
_PAIRED = 32
"""Of so many, the best by the same look, it is also considered that two move one after the other."""
_CROWD = 64
"""Of so many servers, one may move into a gap at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementConfig:
    """What a move must be worth."""

    sharpness: float = field(
        default=48.0, metadata={"help": "how much more the weakest blocks count than others", "unit": ""}
    )
    min_gain: float = field(
        default=0.02, metadata={"help": "least gain of a move, as a share of what the server adds to a balanced swarm"}
    )
    horizon_s: float = field(
        default=14400.0, metadata={"help": "for how long a placement is expected to hold", "unit": "seconds"}
    )
    max_claim: float = field(
        default=4.0, metadata={"help": "a claimed speed counts at most so many times the median of all"}
    )
    max_moves: int = field(default=8, metadata={"help": "servers that may set out at the same time", "unit": "servers"})


class Move(NamedTuple):
    """One server that should serve another span.

    Args:
        peer: Who.
        span: Which blocks it should serve instead.
    """

    peer: PeerId
    span: Span


def choose_span(
    snapshot: Snapshot, model: ModelId, sizes: Sequence[int], room_bytes: int, config: PlacementConfig | None = None
) -> Span:
    """Choose the span where the swarm needs a joining server the most; the first of equal ones.

    Args:
        snapshot: Which servers there are.
        model: The weights.
        sizes: The bytes of each of the model's blocks.
        room_bytes: How many of them the server can hold.
        config: How needs are weighed.

    Raises:
        ValueError: If not even one block fits.
    """
    config = config or PlacementConfig()
    if room_bytes < min(sizes):
        raise ValueError(f"no block of {min(sizes)} bytes or more fits into {room_bytes} bytes")
    return find_span(read_layout(snapshot, model, Sizes(sizes), config.max_claim), room_bytes, config)


def find_span(layout: Layout, room_bytes: int, config: PlacementConfig) -> Span:
    """Choose as :func:`choose_span` does, from a snapshot that has been read already.

    Args:
        layout: Who serves what.
        room_bytes: The bytes of blocks that the server can hold; at least one of them must fit.
        config: How needs are weighed.
    """
    return _Balance(layout, config).best_window(layout.newcomer(room_bytes)).span


def claims_before(snapshot: Snapshot, peer: PeerId, respected: Collection[tuple[PeerId, Span]] = ()) -> Snapshot:
    """Leave out whoever must give way to a joining peer: itself, and joining peers with a greater id.

    Servers that join at the same moment may choose the same span. When each looks again at what was claimed before
    it in this order, all but one of them see the collision, and their choices settle.

    Args:
        snapshot: Which servers there are.
        peer: Who joins.
        respected: Claims that it knew when it chose first. They count whatever the order of ids: whoever made them may
            have settled long ago, and be loading.
    """
    kept = tuple(
        server
        for server in snapshot.announcements
        if server.peer != peer
        and (server.state != "joining" or server.peer < peer or (server.peer, server.span) in respected)
    )
    return Snapshot(announcements=kept, age_s=snapshot.age_s)


def plan_moves(
    snapshot: Snapshot,
    model: ModelId,
    sizes: Sequence[int],
    config: PlacementConfig | None = None,
    *,
    passed_over: Collection[PeerId] = (),
) -> list[Move]:
    """Find which servers should move now, best first: one for each gap, and none if the swarm is balanced.

    No move leaves a block without a server that is online and stays. Each is worth its time: what it adds until things
    change again exceeds what is missing while the server drains and loads. Of servers that would do equally well, the
    one that is missed least goes, then the one with the smallest id.

    Args:
        snapshot: Which servers there are.
        model: The weights.
        sizes: The bytes of each of the model's blocks.
        config: What a move must be worth.
        passed_over: Servers that were to move and did not.
    """
    config = config or PlacementConfig()
    return find_moves(read_layout(snapshot, model, Sizes(sizes), config.max_claim), config, passed_over=passed_over)


def find_moves(layout: Layout, config: PlacementConfig, *, passed_over: Collection[PeerId] = ()) -> list[Move]:
    """Plan as :func:`plan_moves` does, from a snapshot that has been read already.

    Args:
        layout: Who serves what.
        config: What a move must be worth.
        passed_over: Servers that were to move and did not.
    """
    movers = [seat for seat in layout.seats if seat.can_move and seat.peer not in passed_over]
    if moves := _one_by_one(_Balance(layout, config), movers, config.max_moves):
        return moves
    finest = _Balance(layout, config, _FINER)
    if moves := _one_by_one(finest, movers, config.max_moves):
        return moves
    return finest.find_pair(finest.shortlist(movers, _PAIRED, _PAIRED))


def _one_by_one(balance: "_Balance", movers: list[Seat], most: int) -> list[Move]:
    """Find the best move, then the best after that one, and so on, as long as they help and fill different gaps."""
    shortlist = balance.shortlist(movers, _MANY, _SHORTLIST)
    at_once = 1 + len(movers) // _CROWD
    moves: list[Move] = []
    while shortlist and len(moves) < max(most, at_once):
        found, *rest = sorted((balance.consider(seat) for seat in shortlist), key=_rank, reverse=True)
        if not found.is_worthwhile or sum(_overlap(found.span, move.span) for move in moves) >= at_once:
            break
        balance.move(found)
        moves.append(Move(found.seat.peer, found.span))
        shortlist = [other.seat for other in rest[: max(2 * most, at_once)]]
    return moves


def confirm_move(snapshot: Snapshot, model: ModelId, sizes: Sequence[int], move: Move) -> bool:
    """Say whether a server that has announced a move may set out.

    Servers that decide at the same moment may rely on each other to stay, or fill the same gap. Between announcing and
    leaving each looks again: it gives way to announced moves of smaller ids, and of whoever is on the way already.

    Args:
        snapshot: Which servers there are, some time after the move was announced.
        model: The weights.
        sizes: The bytes of each of the model's blocks.
        move: What was announced.
    """
    ours = next((server for server in snapshot.announcements if server.peer == move.peer), None)
    if ours is None:
        return False
    layout = read_layout(snapshot, model, Sizes(sizes), math.inf, giving_way=move.peer)
    seat = next(seat for seat in layout.seats if seat.peer == move.peer)
    config = PlacementConfig()
    found = _Balance(layout, config, _FINER).consider(seat, move.span)
    if found.opens_hole:
        return False
    return found.fills > 0 or found.gain > 0 or move in find_moves(layout, config)


@dataclass(frozen=True, slots=True)
class _Proposal:
    """What a move would do.

    Attributes:
        seat: Who moves.
        span: Where to.
        fills: How many blocks without a server get one.
        gain: How much it adds to the swarm's throughput, in tokens a second.
        loss: How much is missing while it moves.
        opens_hole: Whether a block would be without a server meanwhile.
        is_worthwhile: Whether it should be done.
    """

    seat: Seat
    span: Span
    fills: int
    gain: float
    loss: float
    opens_hole: bool
    is_worthwhile: bool


def _rank(found: _Proposal) -> tuple[bool, int, float, float, tuple[int, ...]]:
    return found.is_worthwhile, found.fills, found.gain, -found.loss, tuple(-ord(letter) for letter in found.seat.peer)


def _overlap(one: Span, other: Span) -> bool:
    return one.start < other.stop and other.start < one.stop


class _Window(NamedTuple):
    span: Span
    fills: int
    relief: float


class _Balance:
    """The throughput of each block, and what changing it is worth.

    Args:
        layout: Who serves what.
        config: How needs are weighed.
        finer: How many times as sharply as the settings say. Whatever it is, what the finest look sees never falls, so
            that moves come to an end.
    """

    def __init__(self, layout: Layout, config: PlacementConfig, finer: float = 1.0) -> None:
        self._layout = layout
        self._config = config
        self._rates = layout.rates()
        self._stable = layout.stable()
        self._scale = finer * config.sharpness / layout.level
        self._finest = _FINER * config.sharpness / layout.level
        self._least = 1e-9 * layout.level
        self._look()

    def _look(self) -> None:
        self._now = self._throughput(self._rates)
        self._now_finest = self._throughput(self._rates, self._finest)

    def shortlist(self, movers: list[Seat], many: int, chosen: int) -> list[Seat]:
        """Of more than ``many`` servers, find those whose move would add most, by a look at needs alone."""
        if len(movers) <= many:
            return list(movers)
        needs = self._sum_needs(self._rates)
        best: dict[int, float] = {}
        scores: list[tuple[float, int]] = []
        for index, (_, start, stop, room, rate, _, _) in enumerate(movers):
            if room not in best:
                best[room] = max(needs[last] - needs[first] for first, last, _ in self._layout.sizes.windows(room))
            share = math.exp(-min(self._scale * rate, 700.0))
            loss = (needs[stop] - needs[start]) * (1.0 - share) / share
            scores.append((loss - best[room] * (1.0 - share), index))
        scores.sort()
        return [movers[index] for _, index in scores[:chosen]]

    def best_window(self, seat: Seat, rates: list[float] | None = None) -> _Window:
        """Find where a server that is nowhere yet is needed most."""
        rates = self._rates if rates is None else rates
        needs = self._sum_needs(rates)
        holes = self._layout.sum_holes(rates)
        found = max(
            (
                holes[stop] - holes[start],
                round((needs[stop] - needs[start]) * -math.expm1(-self._scale * seat.power / size), _DIGITS),
                -start,
                stop,
            )
            for start, stop, size in self._layout.sizes.windows(seat.room_bytes)
        )
        return _Window(Span(-found[2], found[3]), found[0], found[1])

    def consider(self, seat: Seat, span: Span | None = None) -> _Proposal:
        """Say what a move would do, to a given span or to the best there is."""
        without = _added(self._rates, seat.start, seat.stop, -seat.rate)
        span = span or self.best_window(seat, without).span
        then = self._place(without, seat, span)
        gain, loss = self._throughput(then) - self._now, self._now - self._throughput(without)
        opens_hole = any(count <= 1 for count in self._stable[seat.start : seat.stop])
        holes = [sum(rate <= 0.0 for rate in rates) for rates in (self._rates, then)]
        fills = holes[0] - holes[1]
        is_moved = (span.start, span.stop) != (seat.start, seat.stop)
        is_worthwhile = is_moved and not opens_hole and (fills > 0 or self._is_worth_it([seat], gain, loss, then))
        return _Proposal(seat, span, fills, gain, loss, opens_hole, is_worthwhile)

    def find_pair(self, movers: list[Seat]) -> list[Move]:
        """Find two servers of which the first makes room for the second; only the first may set out now.

        Once it has, the second finds its own move the best there is.
        """
        best: tuple[float, list[Move]] = (0.0, [])
        for first, second in permutations(movers, 2):
            if any(count <= 1 for count in self._stable[first.start : first.stop]):
                continue
            without = _added(self._rates, first.start, first.stop, -first.rate)
            both = _added(without, second.start, second.stop, -second.rate)
            target = self.best_window(first, both).span
            then = self._place(both, first, target)
            then = self._place(then, second, self.best_window(second, then).span)
            gain, loss = self._throughput(then) - self._now, self._now - self._throughput(both)
            is_moved = (target.start, target.stop) != (first.start, first.stop)
            if is_moved and gain > best[0] and self._is_worth_it([first, second], gain, loss, then):
                best = gain, [Move(first.peer, target)]
        return best[1]

    def move(self, found: _Proposal) -> None:
        """Take a move as done."""
        seat = found.seat
        self._rates = self._place(_added(self._rates, seat.start, seat.stop, -seat.rate), seat, found.span)
        for block in range(seat.start, seat.stop):
            self._stable[block] -= 1
        self._look()

    def _is_worth_it(self, seats: list[Seat], gain: float, loss: float, then: list[float]) -> bool:
        """Weigh what is gained until things change again against what is missing meanwhile."""
        away_s = max(seat.move_s or 0.0 for seat in seats)
        least = self._config.min_gain * sum(seat.power for seat in seats) / self._layout.sizes.total
        if gain <= least or gain * (self._config.horizon_s - away_s) <= max(loss, 0.0) * away_s:
            return False
        return self._throughput(then, self._finest) > self._now_finest - self._least

    def _place(self, rates: list[float], seat: Seat, span: Span) -> list[float]:
        return _added(rates, span.start, span.stop, seat.power / self._layout.sizes.between(span.start, span.stop))

    def _sum_needs(self, rates: list[float], scale: float | None = None) -> list[float]:
        least, exp = min(rates), math.exp
        scale = scale or self._scale
        return list(accumulate([exp((least - rate) * scale) for rate in rates], initial=0.0))

    def _throughput(self, rates: list[float], scale: float | None = None) -> float:
        """Give the throughput of the swarm: that of its weakest block, smoothed so that each weak one counts."""
        scale = scale or self._scale
        return min(rates) - math.log(self._sum_needs(rates, scale)[-1] / len(rates)) / scale


def _added(rates: list[float], start: int, stop: int, rate: float) -> list[float]:
    changed = rates.copy()
    for block in range(start, stop):
        changed[block] += rate
    return changed

"""Who serves what of one model, and how fast: a snapshot as placement sees it. Pure.

Claims are bounded here, because a placement that believes whatever it is told can be led to leave blocks alone.
"""

from collections.abc import Sequence
from itertools import accumulate
from statistics import median_low
from typing import NamedTuple

from corolla.terms import ModelId, PeerId, Snapshot

__all__ = ["Layout", "Seat", "Sizes", "read_layout"]

_SLOWEST = 0.001
"""Tokens a second; slower servers are all alike."""
_ROUNDING = 1e-9
"""What is left of a throughput after adding and subtracting, relative to the level."""


class Sizes:
    """The bytes of a model's blocks: what bounds a span, and what a token costs in it.

    Args:
        blocks: For each block.
    """

    def __init__(self, blocks: Sequence[int]) -> None:
        self._ends = list(accumulate(blocks, initial=0))
        self._windows: dict[int, list[tuple[int, int, int]]] = {}

    def __len__(self) -> int:
        return len(self._ends) - 1

    @property
    def total(self) -> int:
        """The bytes of all blocks."""
        return self._ends[-1]

    def between(self, start: int, stop: int) -> int:
        """Give the bytes of some blocks."""
        return self._ends[stop] - self._ends[start]

    def windows(self, room_bytes: int) -> list[tuple[int, int, int]]:
        """List the longest spans that fit into so many bytes, none of them within another: start, stop, bytes."""
        found = self._windows.get(room_bytes)
        if found is None:
            found = self._windows[room_bytes] = self._find_windows(room_bytes)
        return found

    def _find_windows(self, room_bytes: int) -> list[tuple[int, int, int]]:
        ends, count = self._ends, len(self)
        found: list[tuple[int, int, int]] = []
        stop = 0
        for start in range(count):
            before, stop = stop, max(stop, start)
            while stop < count and ends[stop + 1] - ends[start] <= room_bytes:
                stop += 1
            if stop > max(before, start):
                found.append((start, stop, ends[stop] - ends[start]))
        return found


class Seat(NamedTuple):
    """A server in its place.

    Args:
        peer: Who.
        start: Its first block, or the first that it is moving to.
        stop: One past the last.
        room_bytes: The bytes of blocks that it holds; it can hold as many elsewhere.
        rate: How many tokens a second it computes there.
        power: ``rate`` times the bytes that a token passes; the same wherever it is.
        move_s: How long it is away when it moves; ``None`` if it does not move now.
    """

    peer: PeerId
    start: int
    stop: int
    room_bytes: int
    rate: float
    power: float
    move_s: float | None

    @property
    def can_move(self) -> bool:
        """Whether it may be asked to move."""
        return self.move_s is not None


class Layout:
    """The servers of a model in their places.

    Args:
        sizes: The model's blocks.
        seats: The servers, movers where they are going.
        usual_power: That of a server of which nothing is known.
        stable: For each block, how many servers are online and do not move.

    Attributes:
        level: The throughput that each block would have if all were alike; never zero.
    """

    def __init__(self, sizes: Sizes, seats: list[Seat], usual_power: float, stable: list[int]) -> None:
        self.sizes = sizes
        self.seats = seats
        self._usual_power = usual_power
        self._stable = stable
        self.level = (sum(seat.power for seat in self.seats) or usual_power) / sizes.total
        self._rates = self._sum_rates()

    def rates(self) -> list[float]:
        """Give, for each block, the tokens a second of the servers that have it."""
        return self._rates.copy()

    def _sum_rates(self) -> list[float]:
        changes = [0.0] * (len(self.sizes) + 1)
        for _, start, stop, _, rate, _, _ in self.seats:
            changes[start] += rate
            changes[stop] -= rate
        least = self.level * _ROUNDING
        return [0.0 if rate < least else rate for rate in accumulate(changes[:-1])]

    def stable(self) -> list[int]:
        """Count, for each block, the servers that are online and do not move."""
        return self._stable.copy()

    def sum_holes(self, rates: list[float]) -> list[int]:
        """Count the blocks before each that have no server."""
        least = self.level * _ROUNDING
        return list(accumulate((rate < least for rate in rates), initial=0))

    def newcomer(self, room_bytes: int) -> Seat:
        """Give a server that is about to join and has measured nothing yet."""
        return Seat(PeerId(""), 0, 0, room_bytes, 0.0, self._usual_power, None)


def read_layout(
    snapshot: Snapshot, model: ModelId, sizes: Sizes, max_claim: float, *, giving_way: PeerId | None = None
) -> Layout:
    """Read a snapshot: whoever moves counts where it is going, and whoever leaves does not count.

    Args:
        snapshot: Which servers there are.
        model: The weights.
        sizes: The bytes of its blocks.
        max_claim: A claimed speed counts at most so many times the median of all.
        giving_way: Who asks whether it may set out. Its own announced move has not happened then, nor have announced
            moves of greater ids that have not begun.
    """
    servers = [
        server
        for server in snapshot.announcements
        if server.model == model and server.span.stop <= len(sizes) and (server.state != "draining" or server.next_span)
    ]
    powers = {
        server.peer: max(speed.decode_tokens_per_s, _SLOWEST) * sizes.between(server.span.start, server.span.stop)
        for server in servers
        if (speed := server.speed) is not None
    }
    usual = median_low(powers.values()) if powers else 1.0
    most = usual * max_claim
    seats: list[Seat] = []
    changes = [0] * (len(sizes) + 1)
    for server in servers:
        is_staying = server.next_span is None or (
            giving_way is not None and server.state == "online" and server.peer >= giving_way
        )
        span = server.span if is_staying else server.next_span or server.span
        if span.stop > len(sizes):
            continue
        is_settled = is_staying and server.state == "online"
        if is_settled:
            changes[span.start] += 1
            changes[span.stop] -= 1
        size = sizes.between(span.start, span.stop)
        power = min(powers.get(server.peer, usual), most)
        seats.append(
            Seat(server.peer, span.start, span.stop, size, power / size, power, server.move_s if is_settled else None)
        )
    return Layout(sizes, seats, usual, list(accumulate(changes[:-1])))

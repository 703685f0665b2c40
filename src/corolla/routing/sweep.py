"""The cheapest way through a span of blocks, among servers with a price. Pure: no clock, no network, no dice.

Blocks are computed in order, so one sweep over them is enough (dynamic programming): before each block, every server
that has it was either entered earlier or is entered now, from wherever the block before is cheapest to leave, or from a
server that pushes its outputs to it.

Of ten thousand servers only a few matter. So the sweep is made over a few, which gives every block a price: what the
way through it adds. A server that asks no less for any run of its blocks than the few do changes nothing (the
potentials of the few are then feasible for the dual of the shortest path over all); those that may ask less join the
few, and the sweep is made again until there are none. ``tests/property/test_chains.py`` holds it against all chains
there are.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from heapq import nsmallest
from itertools import accumulate
from typing import NamedTuple

from corolla.terms import Announcement, Chain, Hop, Span

__all__ = ["Link", "Stay", "Sweeper", "Way"]

_FEW = 64
_FEW_LINKED = 512
"""Fewer servers, without and with links, are swept as they are."""
_BEAM = 16
"""How many servers push at each block in a swarm that is not small."""
_STEPS = 32
"""How finely prices of a block are told apart when servers are left out; a coarser scale leaves out fewer."""

_INFINITY = float("inf")


class Way(NamedTuple):
    """How a block was reached: the last hop, entered at ``start``, and the way before it."""

    before: "Way | None"
    start: int
    stay: "Stay"

    def hops(self, stop: int) -> list[tuple["Stay", int, int]]:
        """List the hops of the way as far as the block before ``stop``: who, from where, to where."""
        found = [(self.stay, self.start, stop)]
        way = self
        while way.before is not None:
            way, stop = way.before, way.start
            found.append((way.stay, way.start, stop))
        return found[::-1]

    def chain(self, stop: int) -> Chain:
        """Write the way down as a chain as far as the block before ``stop``."""
        return Chain(
            tuple(
                Hop(peer=stay.server.peer, span=Span(start, end), addresses=stay.server.addresses)
                for stay, start, end in self.hops(stop)
            )
        )


@dataclass(slots=True, eq=False)
class Stay:
    """A server that may be used, its price, and, during a sweep, the cheapest way to be there.

    Attributes:
        server: Where.
        first: The first block that it may be used for.
        stop: One past the last.
        enter_s: What it costs to send everything there by way of the client, and to wait.
        block_s: What it costs to compute everything in one block.
        leave_s: What it costs to send everything back to the client.
        factor: By how much these costs were raised above what they are.
        links: Servers that it can push to at a lower cost than by the client, and that cost, leaving and entering;
            ``None`` before anybody has asked.
    """

    server: Announcement
    first: int
    stop: int
    enter_s: float
    block_s: float
    leave_s: float
    factor: float = 1.0
    links: Sequence[tuple["Stay", float]] | None = None
    is_present: bool = False
    # Set when a sweep begins for this server: there are many servers, and few of them are swept.
    cost_s: float = field(init=False)
    start: int = field(init=False)
    before: Way | None = field(init=False)
    pushed_s: float = field(init=False)
    pushed_from: Way | None = field(init=False)

    def raise_cost(self, factor: float) -> None:
        """Make everything at this server dearer."""
        self.enter_s *= factor
        self.block_s *= factor
        self.leave_s *= factor
        self.factor *= factor


Link = Callable[[Stay], Sequence[tuple[Stay, float]]]
"""Says to whom a server can push at a lower cost than by the client, and that cost."""


class Sweeper:
    """Finds the cheapest way through all blocks of a span, as often as prices change.

    Args:
        stays: The servers. Between two calls of :meth:`find` their costs may change.
        span: The blocks.
        link: Says to whom a server can push; ``None`` if outputs go by way of the client. With links, prices of blocks
            leave nobody out for certain. So a swarm that is not small is swept as if there were none, and then only
            those who are cheapest to have come to at each block push, to whomever they can.
    """

    def __init__(self, stays: Sequence[Stay], span: Span, link: Link | None = None) -> None:
        self._span = span
        self._link = link
        is_small = len(stays) <= (_FEW if link is None else _FEW_LINKED)
        self._beam = None if is_small else _BEAM
        self._few = dict.fromkeys(stays if is_small else _champions(stays))  # in order, so that ties fall alike
        self._rest = [stay for stay in stays if stay not in self._few]

    def find(self) -> Way | None:
        """Find the cheapest way; ``None`` if some block has no server."""
        while True:
            way, reached_s = _sweep(self._few, self._span)
            if way is None:
                return None
            bargains = dict.fromkeys(_bargains(self._rest, reached_s, self._span))
            if not bargains:
                return way if self._link is None else _sweep(self._few, self._span, self._link, self._beam)[0]
            self._few |= bargains
            self._rest = [stay for stay in self._rest if stay not in bargains]


def _champions(stays: Iterable[Stay]) -> list[Stay]:
    """Choose servers that have, together, every block that any has: for each start, the longest and the cheapest."""
    longest: dict[int, Stay] = {}
    cheapest: dict[int, tuple[float, Stay]] = {}
    for stay in stays:
        first = stay.first
        if first not in longest or stay.stop > longest[first].stop:
            longest[first] = stay
        price_s = stay.block_s + (stay.enter_s + stay.leave_s) / (stay.stop - first)
        if first not in cheapest or price_s < cheapest[first][0]:
            cheapest[first] = price_s, stay
    return [*longest.values(), *(stay for _, stay in cheapest.values())]


def _bargains(stays: Iterable[Stay], reached_s: Sequence[float], span: Span) -> list[Stay]:
    """List the servers that may be cheaper, for some run of their blocks, than the way that was found.

    What a server saves over a run of blocks is at most the sum, over all of its blocks, of what each costs beyond the
    server's own price of a block, less what it costs to enter and leave. The sums are looked up for the next lower
    price of a scale, so that they are never too low.
    """
    prices_s = [after - before for before, after in zip(reached_s, reached_s[1:], strict=False)]
    highest_s = max(prices_s)
    if highest_s <= 0:
        return []
    scale = _STEPS / highest_s
    tables = [
        list(accumulate((max(0.0, price_s - step / scale) for price_s in prices_s), initial=0.0))
        for step in range(_STEPS + 1)  # one more, where rounding leads
    ]
    offset = span.start
    return [
        stay
        for stay in stays
        if stay.block_s < highest_s
        and stay.enter_s + stay.leave_s
        < (saved_s := tables[int(stay.block_s * scale)])[stay.stop - offset] - saved_s[stay.first - offset]
    ]


def _sweep(
    stays: Iterable[Stay], span: Span, link: Link | None = None, beam: int | None = None
) -> tuple[Way | None, list[float]]:
    """Find the cheapest way, and what it costs at least to have come so far and left, for each block's beginning."""
    beginning: dict[int, list[Stay]] = {}
    for stay in stays:
        stay.cost_s = stay.pushed_s = _INFINITY
        stay.is_present = link is not None
        beginning.setdefault(stay.first, []).append(stay)
    present: list[Stay] = []
    reached: Way | None = None
    reached_s = [0.0]
    for block in span.indices:
        present = [stay for stay in present if stay.stop > block] + beginning.get(block, [])
        if not present:
            return None, reached_s
        before_s, best, best_s = reached_s[-1], present[0], _INFINITY
        for stay in present:
            entered_s, before = before_s + stay.enter_s, reached
            if stay.pushed_s < entered_s:
                entered_s, before = stay.pushed_s, stay.pushed_from
            stay.pushed_s = _INFINITY
            if entered_s < stay.cost_s:
                stay.cost_s, stay.before, stay.start = entered_s, before, block
            stay.cost_s += stay.block_s
            if stay.cost_s + stay.leave_s < best_s:
                best, best_s = stay, stay.cost_s + stay.leave_s
        reached = Way(best.before, best.start, best)
        reached_s.append(best_s)
        if link is not None:
            pushing = present if beam is None else nsmallest(beam, present, key=_cost_s)
            present += _push(pushing, block + 1, link)
    return reached, reached_s


def _push(pushing: Iterable[Stay], block: int, link: Link) -> list[Stay]:
    """Let servers offer their outputs to those that have the next block; give those that were left out until now."""
    found: list[Stay] = []
    for stay in pushing:
        if stay.links is None:
            stay.links = link(stay)
        if not stay.links:
            continue
        way = Way(stay.before, stay.start, stay)
        for target, link_s in stay.links:
            pushed_s = stay.cost_s + link_s
            if not target.first <= block < target.stop:
                continue
            if not target.is_present:
                target.is_present, target.cost_s, target.pushed_s = True, _INFINITY, _INFINITY
                found.append(target)
            if pushed_s < target.pushed_s:
                target.pushed_s, target.pushed_from = pushed_s, way
    return found


def _cost_s(stay: Stay) -> float:
    return stay.cost_s

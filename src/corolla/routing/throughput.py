"""Several chains at once, for as many requests a second as a swarm can answer. Pure: no clock, no network, no dice.

Each server answers one request at a time, so the most that chains can carry together is a linear program: maximise the
sum of their rates so that no server is asked for more than one second a second. Chains are found by prices (Garg and
Könemann, "Faster and simpler algorithms for multicommodity flow", FOCS 1998): all servers begin with the same price
for their time; again and again the cheapest chain gets as much as it can carry, and those who carry it become dearer.
So the search for one chain is all that it needs, and the prices themselves bound what is possible, which tells when to
stop. The rates of the chains that were found are then set exactly, by the simplex method.

Widest chains first, each over what the earlier ones left, would be simpler, and stops short wherever a fast server is
spent on blocks that others have: ``tests/property/test_chains.py`` holds both against the optimum.

As a client needs few chains, those that carry most are kept, and their rates are set among themselves.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from corolla.routing.chain import make_stays, no_chain
from corolla.routing.costs import Demand, Known, RoutingConfig, offers
from corolla.routing.sweep import Stay, Sweeper
from corolla.terms import Address, Chain, Hop, PeerId, Snapshot, Span

if TYPE_CHECKING:
    import random

__all__ = ["Lane", "find_chains", "split"]

_GAIN = 0.5
"""How much dearer a server becomes that one chain uses fully."""
_CLOSE = 0.99
"""The share of what is possible at which the search ends."""
_MOST_ROUNDS = 200
_MOST_SWEPT = 5_000
"""Servers that are looked at in all rounds together, beyond two rounds for each chain that is wanted."""
_EPSILON = 1e-9


class Lane(NamedTuple):
    """One of several chains, and the requests that it can answer in a second."""

    chain: Chain
    requests_per_s: float


_Hops = tuple[tuple[PeerId, int, int], ...]
"""Who computes which blocks, from where to where."""


class _Column(NamedTuple):
    """A chain as a column of the program: for how long each of its servers is busy with one request."""

    hops: _Hops
    busy_s: dict[PeerId, float]


def find_chains(
    snapshot: Snapshot,
    demand: Demand,
    known: Known,
    config: RoutingConfig | None = None,
    *,
    limit: int,
    rng: "random.Random | None" = None,
) -> list[Lane]:
    """Find chains that, used at once, answer as many of the demanded requests a second as possible.

    Args:
        snapshot: Which servers there are.
        demand: What one request asks for.
        known: What the client has measured of the servers.
        config: What to assume where nothing was measured.
        limit: How many chains there may be.
        rng: Dice that keep clients apart, as in :func:`~corolla.routing.find_chain`.

    Returns:
        At least one chain; the one that carries most comes first.

    Raises:
        NoChain: If some blocks have no server.
        ValueError: If ``limit`` is below 1.
    """
    if limit < 1:
        raise ValueError(f"{limit} chains were asked for")
    config = config or RoutingConfig()
    stays = make_stays(offers(snapshot, demand), demand, known, config, rng)
    rounds = min(_MOST_ROUNDS, max(2 * limit, _MOST_SWEPT // max(1, len(stays))))
    columns = _search(stays, demand.span, rounds)[: 3 * limit]
    if not columns:
        raise no_chain(snapshot, demand)
    lanes = _ranked(columns)
    if len(lanes) > limit:
        lanes = _ranked([column for column, _ in lanes[:limit]])
    addresses = {server.peer: server.addresses for server in snapshot.announcements}
    return [Lane(_chain(column.hops, addresses), rate) for column, rate in lanes]


def split(total: int, lanes: Sequence[Lane]) -> list[int]:
    """Split a number of equal pieces of work over chains by what each can carry.

    The pieces are given out one after another, each to the chain that would be done with it first.

    Args:
        total: How many pieces there are.
        lanes: The chains.

    Returns:
        How many pieces each chain gets; they add up to ``total``.
    """
    counts = [0] * len(lanes)
    for _ in range(total):
        next_lane = min(range(len(lanes)), key=lambda lane: (counts[lane] + 1) / lanes[lane].requests_per_s)
        counts[next_lane] += 1
    return counts


def _chain(hops: _Hops, addresses: Mapping[PeerId, tuple[Address, ...]]) -> Chain:
    return Chain(tuple(Hop(peer=peer, span=Span(start, stop), addresses=addresses[peer]) for peer, start, stop in hops))


def _ranked(columns: Sequence[_Column]) -> list[tuple[_Column, float]]:
    """Set the rates of chains and put those that carry most first; those that carry nothing are left out."""
    used = [(column, rate) for column, rate in zip(columns, _rates(columns), strict=True) if rate > 0]
    return sorted(used, key=lambda lane: -lane[1])


def _search(stays: Sequence[Stay], span: Span, rounds: int) -> list[_Column]:
    """Find chains worth having, those with most work first: give work to the cheapest, round after round."""
    sweeper = Sweeper(stays, span)
    by_peer = {stay.server.peer: stay for stay in stays}
    prices = dict.fromkeys(by_peer, 1.0)
    loads = dict.fromkeys(by_peer, 0.0)
    columns: dict[_Hops, _Column] = {}
    amounts: dict[_Hops, float] = {}
    sum_of_prices, bound = float(len(stays)), float("inf")
    for _ in range(rounds):
        way = sweeper.find()
        if way is None:
            return []
        hops = tuple((stay.server.peer, start, stop) for stay, start, stop in way.hops(span.stop))
        costs = [
            stay.enter_s + (stop - start) * stay.block_s + stay.leave_s for stay, start, stop in way.hops(span.stop)
        ]
        if hops not in columns:
            columns[hops] = _column(hops, [cost / prices[hop[0]] for hop, cost in zip(hops, costs, strict=True)])
        bound = min(bound, sum_of_prices / sum(costs))  # weak duality: prices at which no chain costs less than 1
        amount = 1 / max(columns[hops].busy_s.values())
        amounts[hops] = amounts.get(hops, 0.0) + amount
        for peer, busy_s in columns[hops].busy_s.items():
            load = amount * busy_s
            loads[peer] += load
            sum_of_prices += prices[peer] * _GAIN * load
            prices[peer] *= 1 + _GAIN * load
            by_peer[peer].raise_cost(1 + _GAIN * load)
        if sum(amounts.values()) / max(loads.values()) >= _CLOSE * bound:
            break
    return sorted(columns.values(), key=lambda column: -amounts[column.hops])


def _column(hops: _Hops, costs_s: Sequence[float]) -> _Column:
    busy_s: dict[PeerId, float] = {}
    for (peer, _, _), cost_s in zip(hops, costs_s, strict=True):
        busy_s[peer] = busy_s.get(peer, 0.0) + cost_s
    return _Column(hops, busy_s)


def _rates(columns: Sequence[_Column]) -> list[float]:
    """Set the rates of given chains so that together they carry the most: the simplex method, on a tableau.

    The first row is the goal, with the rates' reduced costs; the others are servers. Dantzig's rule chooses the column,
    and ties between rows fall to the first; a bound on the pivots stands in for a rule against cycles.
    """
    peers = list({peer: None for column in columns for peer in column.busy_s})
    slacks = [[float(row == other) for other in range(len(peers))] for row in range(len(peers))]
    tableau = [[-1.0] * len(columns) + [0.0] * (len(peers) + 1)]
    tableau += [
        [column.busy_s.get(peer, 0.0) for column in columns] + slack + [1.0]
        for peer, slack in zip(peers, slacks, strict=True)
    ]
    basis = [-1] + [len(columns) + row for row in range(len(peers))]
    for _ in range(4 * (len(columns) + len(peers))):
        entering = min(range(len(columns) + len(peers)), key=tableau[0].__getitem__)
        if tableau[0][entering] > -_EPSILON:
            break
        rows = [row for row in range(1, len(tableau)) if tableau[row][entering] > _EPSILON]
        leaving = min(rows, key=lambda row: tableau[row][-1] / tableau[row][entering])
        divisor = tableau[leaving][entering]
        pivot = [value / divisor for value in tableau[leaving]]
        for row, values in enumerate(tableau):
            if values[entering]:
                factor = values[entering]
                tableau[row] = [value - factor * other for value, other in zip(values, pivot, strict=True)]
        tableau[leaving], basis[leaving] = pivot, entering
    rates = dict(zip(basis, (values[-1] for values in tableau), strict=True))
    return [max(0.0, rates.get(column, 0.0)) for column in range(len(columns))]

"""Which servers to use: the chain of least predicted time through a snapshot. Pure: no clock, no network, no dice."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from corolla.errors import NoChain
from corolla.routing.costs import Demand, Known, RoutingConfig, hop_price, link_saving_s, offers
from corolla.routing.sweep import Link, Stay, Sweeper
from corolla.terms import RTT_PEER_LETTERS, Announcement, Chain, PeerId, Snapshot, Span

if TYPE_CHECKING:
    import random

__all__ = ["find_chain", "make_link", "make_stays", "no_chain", "predict_s", "uncovered"]


def find_chain(
    snapshot: Snapshot,
    demand: Demand,
    known: Known,
    config: RoutingConfig | None = None,
    *,
    rng: "random.Random | None" = None,
) -> Chain:
    """Find the chain of least predicted time.

    With dice, clients that see the same swarm do not all choose the same chain: the cost of each server is raised by
    a random share of itself, up to ``config.spread``, before the best chain is taken. So whatever is chosen costs at
    most that much more than the best, equal chains are equally likely, and a chain is the likelier the nearer it
    comes to the best.

    Args:
        snapshot: Which servers there are.
        demand: What the chain must offer.
        known: What the client has measured of them.
        config: What to assume where nothing was measured.
        rng: The dice; ``None`` for the best chain itself.

    Returns:
        A chain that covers the demanded span, each block once.

    Raises:
        NoChain: If some blocks have no server; the message says which, and how old the view is.
    """
    config = config or RoutingConfig()
    stays = make_stays(offers(snapshot, demand), demand, known, config, rng)
    way = Sweeper(stays, demand.span, make_link(stays, demand, known, config)).find()
    if way is None:
        raise no_chain(snapshot, demand)
    return way.chain(demand.span.stop)


def predict_s(
    chain: Chain,
    snapshot: Snapshot,
    demand: Demand,
    known: Known,
    config: RoutingConfig | None = None,
) -> float:
    """Predict how long all that is demanded takes on a given chain, in seconds.

    Args:
        chain: The chain; servers that are not in the snapshot count nothing.
        snapshot: Which servers there are.
        demand: What is demanded.
        known: What the client has measured of them.
        config: What to assume where nothing was measured.
    """
    config = config or RoutingConfig()
    peers = {hop.peer for hop in chain.hops}
    found = [(server, server.span.start, server.span.stop) for server in snapshot.announcements if server.peer in peers]
    priced = make_stays(found, demand, known, config)
    link = make_link(priced, demand, known, config)
    stays = {stay.server.peer: stay for stay in priced}
    total_s = left_s = 0.0
    links: dict[PeerId, float] = {}
    for hop in chain.hops:
        stay = stays.get(hop.peer)
        if stay is None:
            links = {}
            continue
        pushed_s = links.get(hop.peer)
        total_s += stay.enter_s if pushed_s is None else pushed_s - left_s
        left_s = stay.leave_s
        total_s += len(hop.span) * stay.block_s + left_s
        links = {target.server.peer: link_s for target, link_s in link(stay)} if link else {}
    return total_s


def make_stays(
    found: Sequence[tuple[Announcement, int, int]],
    demand: Demand,
    known: Known,
    config: RoutingConfig,
    rng: "random.Random | None" = None,
) -> list[Stay]:
    """Prepare a sweep: put a price on every server that may be used, and with dice raise it by a random share."""
    price, measured = hop_price(demand, config), known.get
    stays = []
    factor = 1.0
    for server, start, stop in found:
        enter_s, block_s, leave_s = price(server, measured(server.peer))
        if rng is not None:
            factor = 1 + config.spread * rng.random()
        stays.append(Stay(server, start, stop, enter_s * factor, block_s * factor, leave_s * factor, factor))
    return stays


def make_link(stays: Sequence[Stay], demand: Demand, known: Known, config: RoutingConfig) -> Link | None:
    """Prepare to say to whom servers can push, and at what cost; ``None`` if nothing is pushed."""
    if not demand.is_pushed:
        return None
    by_name = {stay.server.peer[:RTT_PEER_LETTERS]: stay for stay in stays}

    def link(stay: Stay) -> list[tuple[Stay, float]]:
        links: dict[str, tuple[Stay, float]] = {}
        measured = known.get(stay.server.peer)
        for rtt in stay.server.rtts:
            target = by_name.get(rtt.peer)
            if target is None or target is stay:
                continue
            saving_s = link_saving_s(rtt.rtt_s, measured, known.get(target.server.peer), demand, config)
            if saving_s > 0:
                whole_s = stay.leave_s / stay.factor + target.enter_s / target.factor
                links[rtt.peer] = target, (whole_s - saving_s) * stay.factor
        return list(links.values())

    return link


def uncovered(snapshot: Snapshot, demand: Demand) -> list[Span]:
    """List the parts of the demanded span that no usable server covers."""
    covered = {block for _, start, stop in offers(snapshot, demand) for block in range(start, stop)}
    gaps: list[Span] = []
    for block in demand.span.indices:
        if block in covered:
            continue
        if gaps and gaps[-1].stop == block:
            gaps[-1] = Span(gaps[-1].start, block + 1)
        else:
            gaps.append(Span(block, block + 1))
    return gaps


def no_chain(snapshot: Snapshot, demand: Demand) -> NoChain:
    """Say that some blocks have no server, which, and what was wished of them."""
    gaps = uncovered(snapshot, demand)
    missing = " and ".join(map(str, gaps))
    wishes = [f"{demand.tokens} free KV tokens"] if demand.tokens else []
    wishes += [f"precision {demand.precision}"] if demand.precision else []
    wishes += [f"adapter {demand.adapter}"] if demand.adapter else []
    wishes += [f"{len(demand.allow)} peers allowed"] if demand.allow else []
    wishes += [f"{len(demand.avoid)} peers avoided"] if demand.avoid else []
    wishes += [f"trust for {demand.trust}"] if demand.trust != "any" else []
    of_model = sum(server.model == demand.model for server in snapshot.announcements)
    return NoChain(
        f"no server for blocks {missing} of model {demand.model[:12]}"
        + (f" (with {', '.join(wishes)})" if wishes else "")
        + f"; {of_model} servers of the model are known, the view is {snapshot.age_s:.0f} s old; "
        + f"wait, or serve them: corolla serve MODEL --blocks {gaps[0]}"
    )

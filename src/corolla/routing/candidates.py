"""Which servers are worth measuring: those that routing would consider. Pure: no clock, no network, no dice."""

from corolla.routing.costs import Demand, Known, Measured, RoutingConfig, hop_price, offers
from corolla.terms import Announcement, Snapshot

__all__ = ["candidates", "likely_successors"]

_FIRST_HOPS = 64
_PER_BLOCK = 4


def candidates(
    snapshot: Snapshot, demand: Demand, known: Known, config: RoutingConfig | None = None
) -> list[Announcement]:
    """List the servers whose round trip matters for a demand, the most promising first.

    These are, by what a block costs at them, the best few of each block, and of those that can be a chain's first hop
    so many that it is all of them in all but the largest swarms. A server that was never measured is taken to be as
    near as the best quarter of those that were: so new ones are measured soon, and in a swarm of thousands the
    measuring ends when enough good ones are known.

    Args:
        snapshot: Which servers there are.
        demand: What will be asked of them.
        known: What was measured of them.
        config: What to assume where nothing was measured.

    Returns:
        A number of servers that depends on the number of blocks, not on the size of the swarm.
    """
    config = config or RoutingConfig()
    price, guess = hop_price(demand, config), _near(known)
    priced = []
    for server, start, stop in offers(snapshot, demand):
        enter_s, block_s, leave_s = price(server, known.get(server.peer, guess))
        priced.append((block_s + (enter_s + leave_s) / (stop - start), start, stop, server))
    priced.sort(key=lambda one: one[0])
    wanted = dict.fromkeys(demand.span.indices, _PER_BLOCK)
    first_hops = _FIRST_HOPS
    chosen = []
    for _, start, stop, server in priced:
        is_first = start == demand.span.start and first_hops > 0
        if is_first or any(block in wanted for block in range(start, stop)):
            chosen.append(server)
            first_hops -= is_first
            for block in range(start, stop):
                if block in wanted:
                    wanted[block] -= 1
                    if not wanted[block]:
                        del wanted[block]
        if not wanted and first_hops <= 0:
            break
    return chosen


def likely_successors(snapshot: Snapshot, own: Announcement) -> list[Announcement]:
    """List the servers that can go on where a server's span ends, the likeliest first: where theirs begins, and fast.

    Args:
        snapshot: Which servers there are.
        own: The server before them.
    """
    stop = own.span.stop
    found = [
        one
        for one in snapshot.announcements
        if one.model == own.model and one.state == "online" and one.peer != own.peer and stop in one.span
    ]
    return sorted(found, key=lambda one: (one.span.start != stop, -(one.speed.decode_tokens_per_s if one.speed else 0)))


def _near(known: Known) -> Measured:
    rtts_s = sorted(measured.rtt_s for measured in known.values() if measured.rtt_s is not None)
    return Measured(rtt_s=rtts_s[len(rtts_s) // 4] if rtts_s else 0.0)

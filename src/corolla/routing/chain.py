"""Which servers to use: the chain of least latency through a snapshot. Pure: no clock, no network, no dice.

A graph has a node for every block boundary at every server that can be left or entered there; its edges are
"compute some blocks here" and "send to the next server". Dijkstra's algorithm finds the cheapest way from the
client through all blocks and back to the client.
"""

import heapq
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from corolla.errors import NoChain
from corolla.terms import Announcement, Chain, DType, Hop, ModelId, PeerId, Snapshot, Span

__all__ = ["Demand", "RoutingConfig", "find_chain", "uncovered"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingConfig:
    """What routing assumes where nothing was measured."""

    unknown_rtt_s: float = field(
        default=0.1, metadata={"help": "round trip to a peer that was never measured", "unit": "seconds"}
    )
    hop_s: float = field(default=0.002, metadata={"help": "fixed cost of one more hop in a chain", "unit": "seconds"})
    unknown_block_s: float = field(
        default=0.01,
        metadata={"help": "time for one block at a server that has not measured itself", "unit": "seconds"},
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What a chain must offer.

    Attributes:
        model: The weights.
        span: The blocks to cover.
        tokens: KV tokens that each server must have free.
        dtype: The precision that servers must compute in; ``None`` for any.
        avoid: Peers not to be used.
    """

    model: ModelId
    span: Span
    tokens: int = 0
    dtype: DType | None = None
    avoid: Collection[PeerId] = ()


def find_chain(
    snapshot: Snapshot, demand: Demand, rtts_s: Mapping[PeerId, float], config: RoutingConfig | None = None
) -> Chain:
    """Find the chain of least predicted latency for one token.

    Args:
        snapshot: Which servers there are.
        demand: What the chain must offer.
        rtts_s: Measured round trips from the client to peers, in seconds.
        config: What to assume where nothing was measured.

    Returns:
        A chain that covers the demanded span, each block once.

    Raises:
        NoChain: If some blocks have no server; the message says which, and how old the view is.
    """
    config = config or RoutingConfig()
    servers = [server for server in snapshot.announcements if _is_usable(server, demand)]
    entries: dict[int, list[Announcement]] = {}
    for block in range(demand.span.start, demand.span.stop):
        entries[block] = [server for server in servers if block in server.span]
    best: dict[int, float] = {demand.span.start: 0.0}
    came_from: dict[int, tuple[int, Announcement]] = {}
    frontier = [(0.0, demand.span.start)]
    while frontier:
        cost_s, block = heapq.heappop(frontier)
        if block == demand.span.stop:
            return _unwind(came_from, demand.span)
        if cost_s > best[block]:
            continue
        for server in entries[block]:
            arrive_s = cost_s + config.hop_s + rtts_s.get(server.peer, config.unknown_rtt_s)
            for stop in range(block + 1, min(server.span.stop, demand.span.stop) + 1):
                total_s = arrive_s + (stop - block) * block_seconds(server, config)
                if total_s < best.get(stop, float("inf")):
                    best[stop] = total_s
                    came_from[stop] = (block, server)
                    heapq.heappush(frontier, (total_s, stop))
    raise _no_chain(snapshot, demand)


def block_seconds(server: Announcement, config: RoutingConfig) -> float:
    """Predict how long a server takes for one token in one block, from what it measured and how many share it."""
    if server.speed is None or server.speed.decode_tokens_per_s <= 0:
        return config.unknown_block_s
    return (1 + server.sessions / 4) / (server.speed.decode_tokens_per_s * len(server.span))


def uncovered(snapshot: Snapshot, demand: Demand) -> list[Span]:
    """List the parts of the demanded span that no usable server covers."""
    servers = [server for server in snapshot.announcements if _is_usable(server, demand)]
    gaps: list[Span] = []
    for block in range(demand.span.start, demand.span.stop):
        if any(block in server.span for server in servers):
            continue
        if gaps and gaps[-1].stop == block:
            gaps[-1] = Span(gaps[-1].start, block + 1)
        else:
            gaps.append(Span(block, block + 1))
    return gaps


def _is_usable(server: Announcement, demand: Demand) -> bool:
    return (
        server.model == demand.model
        and server.state == "online"
        and server.peer not in demand.avoid
        and server.free_tokens >= demand.tokens
        and (demand.dtype is None or server.dtype == demand.dtype)
    )


def _unwind(came_from: Mapping[int, tuple[int, Announcement]], span: Span) -> Chain:
    hops: list[Hop] = []
    stop = span.stop
    while stop != span.start:
        start, server = came_from[stop]
        hops.append(Hop(peer=server.peer, span=Span(start, stop), addresses=server.addresses))
        stop = start
    return Chain(tuple(reversed(hops)))


def _no_chain(snapshot: Snapshot, demand: Demand) -> NoChain:
    gaps = " and ".join(str(gap) for gap in uncovered(snapshot, demand)) or str(demand.span)
    wishes = [f"{demand.tokens} free KV tokens"] if demand.tokens else []
    wishes += [f"precision {demand.dtype}"] if demand.dtype else []
    wishes += [f"{len(demand.avoid)} peers avoided"] if demand.avoid else []
    known = sum(server.model == demand.model for server in snapshot.announcements)
    return NoChain(
        f"no server for blocks {gaps} of model {demand.model[:12]}"
        + (f" (with {', '.join(wishes)})" if wishes else "")
        + f"; {known} servers of the model are known, the view is {snapshot.age_s:.0f} s old; "
        + f"wait, or serve them: corolla serve MODEL --blocks {gaps.split(' ')[0]}"
    )

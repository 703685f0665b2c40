"""Which servers to use: the chain of least latency through a snapshot. Pure: no clock, no network, no dice.

Blocks are computed in order, so one sweep over them is enough (dynamic programming): before each block, every server
that has it was either entered earlier or is entered now, from the cheapest server that computed the block before.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from corolla.errors import NoChain
from corolla.terms import Announcement, Chain, DType, Hop, ModelId, PeerId, Snapshot, Span

__all__ = ["Demand", "RoutingConfig", "block_seconds", "find_chain", "uncovered"]

_SLOWEST_TOKENS_PER_S = 0.001
"""Slower servers are all alike; it keeps every cost finite, whatever a peer claims."""


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


@dataclass(slots=True)
class _Stay:
    """The cheapest way to have reached a server and to be there still.

    Attributes:
        server: Where.
        stop: One past its last block.
        enter_s: What it costs to send a token there.
        block_s: What it costs to compute a token in one block there.
        start: The block at which the way enters.
        cost_s: What the way has cost so far, from the client on.
    """

    server: Announcement
    stop: int
    enter_s: float
    block_s: float
    start: int = 0
    cost_s: float = float("inf")


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
    beginning: dict[int, list[_Stay]] = {}
    for server in _usable(snapshot, demand):
        enter_s = config.hop_s + rtts_s.get(server.peer, config.unknown_rtt_s)
        stay = _Stay(server, server.span.stop, enter_s, block_seconds(server, config))
        beginning.setdefault(max(server.span.start, demand.span.start), []).append(stay)
    stays: list[_Stay] = []
    last: list[tuple[int, Announcement]] = []  # for each block: where it is best computed, and since which block
    reached_s = 0.0
    for block in range(demand.span.start, demand.span.stop):
        stays = [stay for stay in stays if stay.stop > block] + beginning.get(block, [])
        if not stays:
            raise _no_chain(snapshot, demand)
        best = stays[0]
        for stay in stays:
            cost_s, entered_s = stay.cost_s, reached_s + stay.enter_s
            if entered_s < cost_s:
                cost_s, stay.start = entered_s, block
            stay.cost_s = cost_s + stay.block_s
            if stay.cost_s < best.cost_s:
                best = stay
        reached_s = best.cost_s
        last.append((best.start, best.server))
    return _unwind(last, demand.span)


def block_seconds(server: Announcement, config: RoutingConfig) -> float:
    """Predict how long a server takes for one token in one block, from what it measured and how many share it."""
    if server.speed is None:
        return config.unknown_block_s
    tokens_per_s = max(server.speed.decode_tokens_per_s, _SLOWEST_TOKENS_PER_S)
    return (1 + server.sessions / 4) / (tokens_per_s * len(server.span))


def uncovered(snapshot: Snapshot, demand: Demand) -> list[Span]:
    """List the parts of the demanded span that no usable server covers."""
    covered = {block for server in _usable(snapshot, demand) for block in range(server.span.start, server.span.stop)}
    gaps: list[Span] = []
    for block in range(demand.span.start, demand.span.stop):
        if block in covered:
            continue
        if gaps and gaps[-1].stop == block:
            gaps[-1] = Span(gaps[-1].start, block + 1)
        else:
            gaps.append(Span(block, block + 1))
    return gaps


def _usable(snapshot: Snapshot, demand: Demand) -> list[Announcement]:
    """List the servers that offer what is demanded, for at least one block."""
    avoid = frozenset(demand.avoid)
    return [
        server
        for server in snapshot.announcements
        if server.model == demand.model
        and server.state == "online"
        and server.peer not in avoid
        and server.free_tokens >= demand.tokens
        and (demand.dtype is None or server.dtype == demand.dtype)
        and server.span.start < demand.span.stop
        and server.span.stop > demand.span.start
    ]


def _unwind(last: Sequence[tuple[int, Announcement]], span: Span) -> Chain:
    hops: list[Hop] = []
    stop = span.stop
    while stop != span.start:
        start, server = last[stop - span.start - 1]
        hops.append(Hop(peer=server.peer, span=Span(start, stop), addresses=server.addresses))
        stop = start
    return Chain(tuple(reversed(hops)))


def _no_chain(snapshot: Snapshot, demand: Demand) -> NoChain:
    gaps = uncovered(snapshot, demand)
    missing = " and ".join(map(str, gaps))
    wishes = [f"{demand.tokens} free KV tokens"] if demand.tokens else []
    wishes += [f"precision {demand.dtype}"] if demand.dtype else []
    wishes += [f"{len(demand.avoid)} peers avoided"] if demand.avoid else []
    known = sum(server.model == demand.model for server in snapshot.announcements)
    return NoChain(
        f"no server for blocks {missing} of model {demand.model[:12]}"
        + (f" (with {', '.join(wishes)})" if wishes else "")
        + f"; {known} servers of the model are known, the view is {snapshot.age_s:.0f} s old; "
        + f"wait, or serve them: corolla serve MODEL --blocks {gaps[0]}"
    )

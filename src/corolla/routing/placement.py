"""Which span a joining server should take. Pure: from a snapshot, what there is; nothing here moves anybody."""

from collections.abc import Collection

from corolla.terms import ModelId, PeerId, Snapshot, Span

__all__ = ["choose_span", "claims_before", "coverage"]


def coverage(snapshot: Snapshot, model: ModelId, num_blocks: int) -> list[float]:
    """Sum up, for each block, the tokens per second of the servers that have it or are loading it.

    A server that has not measured itself counts as the average of those that have; as 1 if none has.
    """
    servers = [server for server in snapshot.announcements if server.model == model and server.state != "draining"]
    measured = [server.speed.decode_tokens_per_s for server in servers if server.speed]
    usual = sum(measured) / len(measured) if measured else 1.0
    blocks = [0.0] * num_blocks
    for server in servers:
        for block in range(server.span.start, min(server.span.stop, num_blocks)):
            blocks[block] += server.speed.decode_tokens_per_s if server.speed else usual
    return blocks


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


def choose_span(snapshot: Snapshot, model: ModelId, num_blocks: int, length: int) -> Span:
    """Choose the span where the swarm is weakest.

    Spans are compared by the throughput of their weakest block, then of their next weakest, and so on; the first of
    equal ones wins. Source: the greedy placement of arXiv 2312.08361, section 3.2.

    Args:
        snapshot: Which servers there are.
        model: The weights.
        num_blocks: How many blocks the model has.
        length: How many blocks the server can hold.

    Raises:
        ValueError: If ``length`` is not between 1 and ``num_blocks``.
    """
    if not 1 <= length <= num_blocks:
        raise ValueError(f"a span of {length} blocks cannot be chosen from a model of {num_blocks}")
    blocks = coverage(snapshot, model, num_blocks)
    start = min(range(num_blocks - length + 1), key=lambda first: (sorted(blocks[first : first + length]), first))
    return Span(start, start + length)

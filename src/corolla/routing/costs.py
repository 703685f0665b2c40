"""What a chain must offer, and what each server would cost in it. Pure: no clock, no network, no dice.

The cost of a chain is the predicted time of everything that is demanded of it: a prompt, computed in one step, and
then single tokens, one step each. It is a sum over the hops, so that the cheapest chain can be found exactly::

    steps  = decode_steps + (1 if there is a prompt)
    bytes  = (prompt_tokens + rows * decode_steps) * token_bytes
    way    = steps * rtt / 2 + bytes / bandwidth                      from the client to a server, or back
    enter  = way + steps * (queue + hop_s)
    block  = prompt_tokens * prefill_block_s + decode_steps * decode_block_s
    hop    = enter + blocks * block + way

Outputs that are pushed from server to server save the way by the client where the round trip between the two is known
and shorter: ``steps * (rtt_a / 2 + rtt_b / 2 - rtt_ab / 2)``. Pairs that nobody measured are taken to be as far apart
as the way by the client, which is an upper bound.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from corolla.terms import Announcement, ModelId, PeerId, Precision, Snapshot, Span

__all__ = ["Demand", "Known", "Measured", "Price", "RoutingConfig", "Trust", "hop_price", "link_saving_s", "offers"]

_SLOWEST_TOKENS_PER_S = 0.001
_SLOWEST_BYTES_PER_S = 1.0
"""Slower servers are all alike; it keeps every cost finite, whatever a peer claims."""

Trust = Literal["any", "ends", "all"]
"""Which blocks only trusted peers may have: none; the first and the last, whose states say most; or all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingConfig:
    """What routing assumes where nothing was measured, and how far it strays from the best."""

    unknown_rtt_s: float = field(
        default=0.1, metadata={"help": "round trip to a peer that was never measured", "unit": "seconds"}
    )
    hop_s: float = field(
        default=0.002, metadata={"help": "fixed cost of a step at one more hop in a chain", "unit": "seconds"}
    )
    unknown_block_s: float = field(
        default=0.01,
        metadata={"help": "time for one block at a server that has not measured itself", "unit": "seconds"},
    )
    unknown_bytes_per_s: float = field(
        default=12.5e6, metadata={"help": "bandwidth of a peer that was never measured", "unit": "bytes per second"}
    )
    spread: float = field(
        default=0.1,
        metadata={"help": "a chain may cost so much more than the best, as a share of it, to keep clients apart"},
    )


class Measured(NamedTuple):
    """What a client has found out about one peer by itself; ``None`` where it has not.

    It overrides what the peer claims; only of queues, which come and go, the longer one counts.

    Args:
        rtt_s: The round trip, including all of a step that is neither waiting nor computing.
        queue_s: How long work waited before it was computed.
        decode_block_s: Computing a step of one token a row, for one block.
        prefill_block_s: Computing one token of many, for one block.
        bytes_per_s: How fast many bytes came and went.
    """

    rtt_s: float | None = None
    queue_s: float | None = None
    decode_block_s: float | None = None
    prefill_block_s: float | None = None
    bytes_per_s: float | None = None


Known = Mapping[PeerId, Measured]
"""What a client has measured, by peer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What a chain must offer, and what it will be used for.

    Attributes:
        model: The weights.
        span: The blocks to cover.
        tokens: KV tokens that each server must have free.
        prompt_tokens: Tokens, over all rows, that are computed at once.
        decode_steps: Steps of one token a row that follow.
        rows: How many rows such a step has.
        token_bytes: What the hidden state of one token takes on its way.
        precision: What servers must hold their weights in; ``None`` for any.
        adapter: The adapter that servers must have; ``None`` for none.
        allow: The only peers that may be used; empty for any.
        avoid: Peers not to be used.
        trusted: Peers who may see what others may not.
        trust: Which blocks only they may have.
        is_pushed: Whether outputs go from server to server instead of by the client.
    """

    model: ModelId
    span: Span
    tokens: int = 0
    prompt_tokens: int = 0
    decode_steps: int = 1
    rows: int = 1
    token_bytes: float = 0
    precision: Precision | None = None
    adapter: str | None = None
    allow: Collection[PeerId] = ()
    avoid: Collection[PeerId] = ()
    trusted: Collection[PeerId] = ()
    trust: Trust = "any"
    is_pushed: bool = False

    @property
    def steps(self) -> int:
        """How many steps there will be, the prompt's included."""
        return self.decode_steps + (self.prompt_tokens > 0)

    @property
    def nbytes(self) -> float:
        """How many bytes will go each way."""
        return (self.prompt_tokens + self.rows * self.decode_steps) * self.token_bytes


def offers(snapshot: Snapshot, demand: Demand) -> list[tuple[Announcement, int, int]]:
    """List the servers that offer what is demanded; for each, the first block it may be used for, and its stop."""
    allow, avoid, trusted = frozenset(demand.allow), frozenset(demand.avoid), frozenset(demand.trusted)
    first, last = demand.span.start, demand.span.stop
    found = []
    for server in snapshot.announcements:
        if (
            server.model != demand.model
            or server.state != "online"
            or server.free_tokens < demand.tokens
            or server.peer in avoid
            or (allow and server.peer not in allow)
            or (demand.precision is not None and server.precision != demand.precision)
            or (demand.adapter is not None and demand.adapter not in server.adapters)
        ):
            continue
        span = server.span
        start, stop = max(span.start, first), min(span.stop, last)
        if demand.trust != "any" and server.peer not in trusted:
            if demand.trust == "all":
                continue
            start, stop = max(start, 1), min(stop, server.num_blocks - 1)
        if start < stop:
            found.append((server, start, stop))
    return found


Price = Callable[[Announcement, Measured | None], tuple[float, float, float]]
"""From a server, and what was measured of it, to seconds over all that is demanded: to send it there and wait, to
compute it in one block, and to send it back."""


def hop_price(demand: Demand, config: RoutingConfig) -> Price:
    """Prepare to predict what using servers costs, from what they claim and what was measured.

    Args:
        demand: What is demanded.
        config: What to assume where nothing was measured.
    """
    steps, nbytes = demand.steps, demand.nbytes
    prompt_tokens, decode_steps = demand.prompt_tokens, demand.decode_steps
    unknown_rtt_s, unknown_block_s = config.unknown_rtt_s, config.unknown_block_s
    unknown_bytes_per_s = config.unknown_bytes_per_s
    hops_s = steps * config.hop_s

    def price(server: Announcement, measured: Measured | None) -> tuple[float, float, float]:
        rtt_s, queue_s, decode_s, prefill_s, bytes_per_s = measured or _UNMEASURED
        if rtt_s is None:
            rtt_s = unknown_rtt_s
        if bytes_per_s is None:
            bytes_per_s = unknown_bytes_per_s if server.bytes_per_s is None else server.bytes_per_s
        if queue_s is None or queue_s < server.queue_s:
            queue_s = server.queue_s
        way_s = steps * rtt_s / 2 + nbytes / max(bytes_per_s, _SLOWEST_BYTES_PER_S)
        if decode_s is None or prefill_s is None:
            claimed_decode_s, claimed_prefill_s = _claimed_s(server, unknown_block_s)
            decode_s = claimed_decode_s if decode_s is None else decode_s
            prefill_s = claimed_prefill_s if prefill_s is None else prefill_s
        block_s = decode_steps * decode_s + prompt_tokens * prefill_s
        return way_s + hops_s + steps * queue_s, block_s, way_s

    return price


def link_saving_s(
    rtt_ab_s: float, left: Measured | None, right: Measured | None, demand: Demand, config: RoutingConfig
) -> float:
    """Predict what pushing outputs from one server to the next saves, compared with the way by the client.

    No announced round trip can be shorter than the difference of the client's own to the two; so a server that claims
    to be near everybody gains nothing beyond what is possible.

    Args:
        rtt_ab_s: The round trip between the servers, as one of them claims.
        left: What the client has measured of the one.
        right: What it has measured of the other.
        demand: What is demanded.
        config: What to assume where nothing was measured.

    Returns:
        Seconds over all steps; 0 if the client is no detour.
    """
    left_s, right_s = left.rtt_s if left else None, right.rtt_s if right else None
    if left_s is not None and right_s is not None:
        rtt_ab_s = max(rtt_ab_s, abs(left_s - right_s))
    by_client_s = sum(config.unknown_rtt_s if rtt_s is None else rtt_s for rtt_s in (left_s, right_s))
    return max(0.0, demand.steps * (by_client_s - rtt_ab_s) / 2)


_UNMEASURED = Measured()


def _claimed_s(server: Announcement, unknown_s: float) -> tuple[float, float]:
    """Give the times for one token in one block, alone and of many, that follow from a claim and from the load."""
    speed, span = server.speed, server.span
    if speed is None:
        return unknown_s, unknown_s
    share = (1 + server.sessions / 4) / (span.stop - span.start)
    decode_per_s = speed.decode_tokens_per_s
    prefill_per_s = speed.prefill_tokens_per_s or decode_per_s
    return share / max(decode_per_s, _SLOWEST_TOKENS_PER_S), share / max(prefill_per_s, _SLOWEST_TOKENS_PER_S)

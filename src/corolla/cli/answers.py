"""An answer and what it took, as data and in words. Knows no model, no swarm and no terminal."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from corolla.terms import Chain

if TYPE_CHECKING:
    from corolla.client import HopTiming, Replay

__all__ = ["Answer", "Cost", "describe_chain", "describe_cost"]


@dataclass(frozen=True, slots=True)
class Cost:
    """What an answer took.

    Args:
        tokens: How many were generated.
        ttft_s: From the question to the first of them.
        tokens_per_s: From the first to the last; ``None`` if there was only one.
        chain: The servers that computed it.
        timings: For each of them, where its share of the last step went.
        replays: What servers were given because others had failed meanwhile.
    """

    tokens: int
    ttft_s: float
    tokens_per_s: float | None
    chain: Chain | None
    timings: "tuple[HopTiming, ...]"
    replays: "tuple[Replay, ...]" = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said.

    Args:
        text: Without special tokens; it may hold anything, control characters too.
        cost: What it took.
    """

    text: str
    cost: Cost


def describe_chain(chain: Chain | None) -> str:
    """Write a chain as ``a1b2c3d4 0:10 -> e5f6g7h2 10:20``."""
    return " -> ".join(f"{hop.peer[:8]} {hop.span}" for hop in chain.hops) if chain else "no chain yet"


def describe_cost(cost: Cost) -> str:
    """Write what an answer took: the chain and the speed, where its last step's time went, and what it survived."""
    speed = f", {cost.tokens_per_s:.1f} tokens/s" if cost.tokens_per_s else ""
    hops = ", ".join(
        f"{one.hop.peer[:8]} {one.compute_s * 1000:.1f} + {one.network_s * 1000:.1f}" for one in cost.timings
    )
    survived = [
        f"[a server was lost: {one.hop.peer[:8]} took over {one.hop.span}, given {one.tokens} tokens "
        f"in {one.elapsed_s:.2f} s]"
        for one in cost.replays
    ]
    lines = [
        f"[{describe_chain(cost.chain)}] {cost.tokens} tokens, first after {cost.ttft_s:.2f} s{speed}",
        f"[last step, ms of compute + network: {hops}]",
    ]
    return "\n".join([*lines, *survived])

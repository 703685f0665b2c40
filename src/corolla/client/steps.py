"""What a session's step is made of, and what comes of it."""

# N packed tokens, D model width

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from corolla.routing import Work
from corolla.terms import Hop
from corolla.wire import Step, Timing

__all__ = ["Answer", "HopTiming", "Replay", "StepResult", "StepTokens", "work_done"]


class HopTiming(NamedTuple):
    """Where one hop's share of a step went, in seconds.

    Args:
        hop: Which hop.
        total_s: From what was heard of the step before this hop, or its beginning, to what the hop says of it.
        queue_s: Waiting at the server.
        compute_s: Computing at the server.
    """

    hop: Hop
    total_s: float
    queue_s: float
    compute_s: float

    @property
    def network_s(self) -> float:
        """What is left: encoding, travelling, decoding."""
        return max(0.0, self.total_s - self.queue_s - self.compute_s)


class Replay(NamedTuple):
    """A hop was given what another had held.

    Args:
        hop: The hop that has it now.
        tokens: How many tokens it was sent.
        elapsed_s: How long that took.
    """

    hop: Hop
    tokens: int
    elapsed_s: float


class Answer(NamedTuple):
    """What a hop says of a step.

    Args:
        number: Which step.
        hop: Which hop.
        tensors: The last block's output, from the last hop only; then the outputs of the taps that are the hop's.
        timing: Where the hop's time went.
    """

    number: int
    hop: Hop
    tensors: list[torch.Tensor]
    timing: Timing


class StepResult(NamedTuple):
    """What came of a step.

    Args:
        hidden_ND: The last block's output for the step's tokens.
        taps: The outputs of the blocks that were asked for, by block.
    """

    hidden_ND: torch.Tensor
    taps: dict[int, torch.Tensor]


@dataclass(frozen=True, slots=True)
class StepTokens:
    """New tokens of a session's rows: row ``i`` keeps ``starts[i]`` tokens and gets ``counts[i]`` of ``hidden_ND``."""

    hidden_ND: torch.Tensor
    starts: tuple[int, ...]
    counts: tuple[int, ...]
    order: tuple[int, ...] | None = None

    def pieces(self, limit_tokens: int) -> Iterator["StepTokens"]:
        """Cut the step into steps of at most ``limit_tokens`` tokens that do the same one after another."""
        total = len(self.hidden_ND)
        for first in range(0, total, limit_tokens):
            last = min(first + limit_tokens, total)
            starts, counts, offset = [], [], 0
            for start, count in zip(self.starts, self.counts, strict=True):
                done = min(max(first - offset, 0), count)
                starts.append(start + done)
                counts.append(min(max(last - offset, 0), count) - done)
                offset += count
            order = self.order if first == 0 else None
            yield StepTokens(self.hidden_ND[first:last], tuple(starts), tuple(counts), order)


def work_done(hop: Hop, step: Step, timing: Timing, total_s: float | None) -> Work:
    """Say what a hop has done for a step whose outputs are pushed.

    Args:
        hop: Which hop.
        step: The step.
        timing: What the hop says of its time.
        total_s: From what was heard of the step before this hop to what the hop says of it, if nothing came between.
    """
    return Work(
        blocks=len(hop.span),
        tokens=sum(step.counts),
        is_decode=max(step.counts) == 1,
        nbytes=0,
        total_s=total_s,
        queue_s=timing.queue_s,
        compute_s=timing.compute_s,
        is_pushed=True,
    )

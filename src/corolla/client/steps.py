"""What a session's step is made of, and what comes of it."""

# N packed tokens, D model width

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from corolla.routing import Work
from corolla.terms import Hop
from corolla.wire import Done, Output, Step, Timing

__all__ = ["Answer", "HopTiming", "Pace", "Replay", "StepResult", "StepTokens"]


class HopTiming(NamedTuple):
    """Where one hop's share of a step went, in seconds.

    Args:
        hop: Which hop.
        total_s: From what was heard of the step before this hop, or its beginning, to what the hop says of it.
        queue_s: Waiting at the server.
        compute_s: Computing at the server.
        found_tokens: How many of all tokens of the step the server says it had computed before.
    """

    hop: Hop
    total_s: float
    queue_s: float
    compute_s: float
    found_tokens: int = 0

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


class Pace:
    """How long each hop takes for steps whose outputs are pushed, told by when something was last heard of a step."""

    def __init__(self) -> None:
        self._passed_s: dict[int, float] = {}

    def begin(self, number: int) -> None:
        """Note that a step was sent."""
        self._passed_s[number] = time.perf_counter()

    def forget(self) -> None:
        """Note that what comes next was disturbed."""
        self._passed_s.clear()

    def settle(self, number: int) -> None:
        """Note that nothing more will be heard of the steps up to this one."""
        self._passed_s = {step: at_s for step, at_s in self._passed_s.items() if step > number}

    def work(self, hop: Hop, step: Step, answer: Done | Output) -> Work:
        """Say what a hop has done for a step, and how long it took; how far away it is, pings tell.

        Args:
            hop: Which hop.
            step: The step.
            answer: What the hop says of it.
        """
        now_s, passed_s = time.perf_counter(), self._passed_s.get(step.number)
        self._passed_s[step.number] = now_s
        return Work(
            blocks=len(hop.span),
            tokens=max(1, sum(step.counts) - answer.timing.found_tokens),
            is_decode=max(step.counts) == 1,
            nbytes=0,
            total_s=None if passed_s is None else now_s - passed_s,
            queue_s=answer.timing.queue_s,
            compute_s=answer.timing.compute_s,
            is_pushed=True,
            load=None if answer.load is None else (answer.load.free_tokens, answer.load.sessions),
        )

"""What to compute next. Pure: no thread, no clock, no tensor is touched.

Sessions come first. A tick takes the next token of every session that waits for one (continuous batching) and fills
up with a bounded part of the oldest long prompt, so that a prompt delays the others by one tick at most. Training
work is cut into ticks as well; when both wait, sessions get ``steps_per_forward`` ticks for each one that training
gets, so neither starves.
"""

from collections import deque
from typing import NamedTuple

from corolla.engine.config import EngineConfig
from corolla.engine.work import ForwardWork, RowSlice, StepWork
from corolla.errors import PeerBusy

__all__ = ["DECODE_TOKENS", "ForwardTick", "Scheduler", "StepTick"]

DECODE_TOKENS = 16
"""A step of at most so many tokens is a decode step, also when it checks a few drafted tokens: it is never cut."""


class StepTick(NamedTuple):
    """Tokens of some sessions, to be computed at once; all go through the same blocks and have the same taps."""

    parts: tuple[tuple[StepWork, tuple[RowSlice, ...]], ...]


class ForwardTick(NamedTuple):
    """Some rows of one training batch."""

    work: ForwardWork
    rows: slice


class Scheduler:
    """Waiting work, and the order in which it is done.

    Args:
        config: Limits and shares.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._steps: deque[StepWork] = deque()
        self._forwards: deque[ForwardWork] = deque()
        self._ticks_since_forward = 0

    def __len__(self) -> int:
        return len(self._steps) + len(self._forwards)

    def waiting(self) -> list[StepWork | ForwardWork]:
        """List all work that is not complete."""
        return [*self._steps, *self._forwards]

    def put(self, work: StepWork | ForwardWork) -> None:
        """Let work wait for its turn.

        Raises:
            PeerBusy: If too much waits already.
        """
        if len(self) >= self._config.queue_length:
            raise PeerBusy(f"{len(self)} requests are waiting already", retry_after_s=1.0)
        if isinstance(work, StepWork):
            self._steps.append(work)
        else:
            self._forwards.append(work)

    def take(self) -> StepTick | ForwardTick | None:
        """Choose the next tick; ``None`` if nothing waits. Cancelled work is dropped."""
        self._steps = deque(work for work in self._steps if not work.is_cancelled)
        self._forwards = deque(work for work in self._forwards if not work.is_cancelled)
        forward_is_due = self._ticks_since_forward >= self._config.steps_per_forward
        if self._forwards and (forward_is_due or not self._steps):
            self._ticks_since_forward = 0
            work = self._forwards[0]
            return ForwardTick(work, work.next_rows(self._config.forward_tokens))
        if self._steps:
            self._ticks_since_forward += 1
            return self._take_steps()
        return None

    def finish(self, work: StepWork | ForwardWork) -> None:
        """Take work out that is complete or has failed."""
        if isinstance(work, StepWork):
            self._steps.remove(work)
        else:
            self._forwards.remove(work)

    def rotate(self) -> None:
        """Let the oldest training batch wait behind the others, so that one large batch does not hold them up."""
        self._forwards.rotate(-1)

    def _take_steps(self) -> StepTick:
        first = self._steps[0]
        alike = [work for work in self._steps if (work.blocks, work.taps) == (first.blocks, first.taps)]
        decodes = [work for work in alike if work.left_tokens <= DECODE_TOKENS]
        parts = [(work, tuple(work.slices(work.left_tokens))) for work in decodes]
        budget_tokens = max(self._config.tick_tokens - sum(work.left_tokens for work in decodes), DECODE_TOKENS)
        for work in alike:
            if work.left_tokens > DECODE_TOKENS and budget_tokens > 0:
                slices = tuple(work.slices(budget_tokens))
                parts.append((work, slices))
                budget_tokens -= sum(part.tokens for part in slices)
        if len(alike) < len(self._steps):  # sessions on other blocks of the span have the next tick
            others = [work for work in self._steps if (work.blocks, work.taps) != (first.blocks, first.taps)]
            self._steps = deque([*others, *alike])
        return StepTick(tuple(parts))

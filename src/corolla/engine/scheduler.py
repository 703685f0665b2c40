"""What to compute next. Pure: no thread, no clock, no tensor is touched.

Sessions come first. A tick gives each step that waits up to ``SHARE_TOKENS`` of its tokens, so that every decoding
session has its next token (continuous batching), and the rest of the tick to the oldest long prompt: it delays the
others by one tick at most. Steps that a tick had no room for, or that run through other blocks, come first in the
next. Training work is cut into ticks as well; when both wait, sessions get ``steps_per_forward`` ticks for each one
that training gets, so neither starves.
"""

from collections import deque
from typing import NamedTuple

from corolla.engine.config import EngineConfig
from corolla.engine.work import ForwardWork, RowSlice, StepWork
from corolla.errors import PeerBusy

__all__ = ["SHARE_TOKENS", "ForwardTick", "Scheduler", "StepTick"]

SHARE_TOKENS = 16
"""What each step gets of a tick before any gets more: enough for a token of a beam search's every row, or for some
drafted tokens and their check."""


class StepTick(NamedTuple):
    """Tokens of some sessions, to be computed at once; all go through the same blocks and have the same taps."""

    parts: tuple[tuple[StepWork, tuple[RowSlice, ...]], ...]

    @property
    def tokens(self) -> int:
        """How many tokens it computes."""
        return sum(part.tokens for _, slices in self.parts for part in slices)

    @property
    def is_decoding(self) -> bool:
        """Whether it has no more of any step than its share."""
        return self.tokens <= SHARE_TOKENS * len(self.parts)


class ForwardTick(NamedTuple):
    """Some rows of one training batch."""

    work: ForwardWork
    rows: slice

    @property
    def tokens(self) -> int:
        """How many tokens it computes."""
        return int((self.rows.stop - self.rows.start) * self.work.hidden_BTD.shape[1])


class Scheduler:
    """Waiting work, and the order in which it is done.

    Args:
        config: Limits and shares.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._steps: deque[StepWork] = deque()
        self._fresh: deque[StepWork] = deque()
        self._forwards: deque[ForwardWork] = deque()
        self._ticks_since_forward = 0

    def __len__(self) -> int:
        return len(self._steps) + len(self._forwards)

    @property
    def gathered(self) -> int | None:
        """How many sessions wait for their next token; ``None`` if other work waits, which should not wait for more."""
        if self._forwards or any(work.left_tokens > SHARE_TOKENS for work in self._steps):
            return None
        return len(self._steps)

    def fresh(self) -> StepWork | None:
        """Give a step whose rows are not yet as it wants them; that comes before any of its tokens."""
        while self._fresh:
            work = self._fresh.popleft()
            if not work.is_cancelled:
                return work
        return None

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
            self._fresh.append(work)
        else:
            self._forwards.append(work)

    def take(self) -> StepTick | ForwardTick | None:
        """Choose the next tick; ``None`` if nothing waits. Cancelled work is dropped.

        The work stays until it is taken out by :meth:`finish`; the next tick goes on where this one ends.
        """
        self._steps = deque(work for work in self._steps if not work.is_cancelled)
        self._forwards = deque(work for work in self._forwards if not work.is_cancelled)
        forward_is_due = self._ticks_since_forward >= self._config.steps_per_forward
        if self._forwards and (forward_is_due or not self._steps):
            self._ticks_since_forward = 0
            work = self._forwards[0]
            self._forwards.rotate(-1)  # batches take turns, so that a large one does not hold up the others
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

    def _take_steps(self) -> StepTick:
        first = self._steps[0]
        alike = [work for work in self._steps if (work.blocks, work.taps) == (first.blocks, first.taps)]
        left_tokens = self._config.tick_tokens
        shares: dict[StepWork, int] = {}
        for work in alike:
            shares[work] = min(work.left_tokens, SHARE_TOKENS, left_tokens)
            left_tokens -= shares[work]
        for work in alike:
            more = min(work.left_tokens - shares[work], left_tokens)
            shares[work] += more
            left_tokens -= more
        served = {work: share for work, share in shares.items() if share}
        self._steps = deque([*(work for work in self._steps if work not in served), *served])
        return StepTick(tuple((work, tuple(work.slices(share))) for work, share in served.items()))

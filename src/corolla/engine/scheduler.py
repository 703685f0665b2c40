"""What to compute next. Pure: no thread, no clock, no tensor is touched.

Sessions come first. A tick gives each step that waits up to ``SHARE_TOKENS`` of its tokens, so that every decoding
session has its next token (continuous batching), and the rest of the tick to long prompts, beginning with the client
that has had least: they delay the others by one tick at most, which is kept short while others decode. Steps that a
tick had no room for, or that run through other blocks, come first in the next. Training work is cut into ticks as well;
when both wait, sessions get ``steps_per_forward`` ticks for each one that training gets, so neither starves.
"""

from collections import deque
from typing import NamedTuple

from corolla.engine.config import EngineConfig
from corolla.engine.work import ForwardWork, RowSlice, SessionRows, StepWork
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

    def apart(self) -> tuple[list[SessionRows], int]:
        """Tell sessions that have no more than a share of it from the tokens of prompts."""
        counts = [(work, sum(part.tokens for part in slices)) for work, slices in self.parts]
        few = [work.session for work, tokens in counts if tokens <= SHARE_TOKENS and max(work.counts) == 1]
        return few, self.tokens - sum(tokens for work, tokens in counts if work.session in few)


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
        self._had: dict[str, int] = {}  # of each client that waits, the tokens of prompts and training it has had

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
        waiting = {one.client for one in self.waiting()}
        self._had = {client: had for client, had in self._had.items() if client in waiting}
        self._had.setdefault(work.client, min(self._had.values(), default=0))
        if isinstance(work, StepWork):
            self._steps.append(work)
            self._fresh.append(work)
        else:
            self._forwards.append(work)

    def take(self, prompt_tokens: int | None = None) -> StepTick | ForwardTick | None:
        """Choose the next tick; ``None`` if nothing waits. Cancelled work is dropped.

        Args:
            prompt_tokens: The most tokens of long prompts in it; ``None`` for as many as there is room for.

        The work stays until it is taken out by :meth:`finish`; the next tick goes on where this one ends.
        """
        self._steps = deque(work for work in self._steps if not work.is_cancelled)
        self._forwards = deque(work for work in self._forwards if not work.is_cancelled)
        forward_is_due = self._ticks_since_forward >= self._config.steps_per_forward
        if self._forwards and (forward_is_due or not self._steps):
            self._ticks_since_forward = 0
            work = min(self._forwards, key=self._had_by)
            self._forwards.remove(work)  # batches take turns, so that a large one does not hold up the others
            self._forwards.append(work)
            tick = ForwardTick(work, work.next_rows(self._config.forward_tokens))
            self._had[work.client] += tick.tokens
            return tick
        if self._steps:
            self._ticks_since_forward += 1
            return self._take_steps(self._config.tick_tokens if prompt_tokens is None else prompt_tokens)
        return None

    def finish(self, work: StepWork | ForwardWork) -> None:
        """Take work out that is complete or has failed."""
        if isinstance(work, StepWork):
            self._steps.remove(work)
        else:
            self._forwards.remove(work)

    def _take_steps(self, prompt_tokens: int) -> StepTick:
        first = self._steps[0]
        alike = [work for work in self._steps if (work.blocks, work.taps) == (first.blocks, first.taps)]
        prompts = [work for work in alike if work.left_tokens > SHARE_TOKENS]
        left_tokens = self._config.tick_tokens
        shares: dict[StepWork, int] = {}
        for work in alike:
            room = min(left_tokens, prompt_tokens) if work in prompts else left_tokens
            shares[work] = min(work.left_tokens, SHARE_TOKENS, room)
            left_tokens -= shares[work]
            prompt_tokens -= shares[work] if work in prompts else 0
        for work in sorted(prompts, key=self._had_by):
            more = min(work.left_tokens - shares[work], left_tokens, prompt_tokens)
            shares[work] += more
            left_tokens -= more
            prompt_tokens -= more
        for work in prompts:
            self._had[work.client] += shares[work]
        served = {work: share for work, share in shares.items() if share}
        self._steps = deque([*(work for work in self._steps if work not in served), *served])
        return StepTick(tuple((work, tuple(work.slices(share))) for work, share in served.items()))

    def _had_by(self, work: StepWork | ForwardWork) -> int:
        return self._had[work.client]

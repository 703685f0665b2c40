"""How long a tick waits for company, and how much of a prompt others wait for. Pure: no thread, no clock.

A tick of single tokens takes hardly longer for many sessions than for one, since its time is that of reading the
weights. Sessions that come one by one, though, would each find the device free and get a tick of their own. So a tick
waits until half of the sessions that are decoding are there: the others are at other servers or at their clients
meanwhile. Once together they stay so, and nobody waits. It never waits longer than a tick takes, which is what a step
waits that comes just after one has begun.
"""

from collections.abc import Collection
from typing import Final

from corolla.engine.work import SessionRows

__all__ = ["Gathering"]

_REMEMBERED_TICKS: Final = 16
"""A session decodes as long as it comes again within the time of so many ticks."""
_REMEMBERED_S: Final = 1.0
"""Or within this, however short ticks are: its client may be far away."""
_WEIGHT: Final = 0.2
"""Of a new tick in the average."""
_LEAST_TOKENS: Final = 16
"""A prompt gets so many tokens of a tick at least, and always a multiple of them."""


class Gathering:
    """Knows who is decoding, and how long a tick takes."""

    def __init__(self) -> None:
        self._seen_at_s: dict[SessionRows, float] = {}
        self._tick_s = 0.0
        self._token_s = 0.0

    def note(self, sessions: Collection[SessionRows], started_at_s: float, elapsed_s: float) -> None:
        """Note a tick of single tokens.

        Args:
            sessions: Whose tokens.
            started_at_s: When it began.
            elapsed_s: How long it took.
        """
        self._tick_s += (elapsed_s - self._tick_s) * (_WEIGHT if self._tick_s else 1)
        self._seen_at_s |= dict.fromkeys(sessions, started_at_s + elapsed_s)
        since_s = started_at_s - _REMEMBERED_TICKS * self._tick_s
        self._seen_at_s = {one: at_s for one, at_s in self._seen_at_s.items() if at_s >= since_s and not one.ended}

    def note_prompt(
        self, sessions: Collection[SessionRows], tokens: int, started_at_s: float, elapsed_s: float
    ) -> None:
        """Note a tick with tokens of prompts.

        Args:
            sessions: Whose single tokens it had as well.
            tokens: How many others it had.
            started_at_s: When it began.
            elapsed_s: How long it took.
        """
        self._seen_at_s |= dict.fromkeys(sessions, started_at_s + elapsed_s)
        token_s = elapsed_s / tokens
        self._token_s += (token_s - self._token_s) * (_WEIGHT if self._token_s else 1)

    def prompt_tokens(self, limit_s: float, now_s: float) -> int | None:
        """Say how many tokens of prompts a tick may have so that those who decode wait no longer than a limit.

        Args:
            limit_s: The limit.
            now_s: What time it is.

        Returns:
            How many; ``None`` for as many as there is room for, as nobody decodes or nothing is known.
        """
        since_s = now_s - max(_REMEMBERED_S, _REMEMBERED_TICKS * self._tick_s)
        if not self._token_s or all(at_s < since_s or one.ended for one, at_s in self._seen_at_s.items()):
            return None
        return max(1, int(limit_s / self._token_s / _LEAST_TOKENS)) * _LEAST_TOKENS

    def wait_s(self, sessions: int, free_at_s: float, now_s: float) -> float:
        """Say how long to wait for more sessions; 0 to begin.

        Args:
            sessions: How many are there.
            free_at_s: Since when the device could have begun.
            now_s: What time it is.
        """
        if sessions >= len(self._seen_at_s) // 2:
            return 0.0
        return max(0.0, free_at_s + self._tick_s - now_s)

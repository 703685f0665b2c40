"""How long a tick waits for company. Pure: no thread, no clock.

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
_WEIGHT: Final = 0.2
"""Of a new tick in the average."""


class Gathering:
    """Knows who is decoding, and how long a tick takes."""

    def __init__(self) -> None:
        self._seen_at_s: dict[SessionRows, float] = {}
        self._tick_s = 0.0

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

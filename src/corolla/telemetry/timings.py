"""Timings: how often something was done and how long it took, by name.

Owns the sums and the clock that feeds them. It must not know what is timed or who reads the numbers.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

__all__ = ["Timing", "Timings"]


@dataclass(frozen=True, slots=True)
class Timing:
    """What is known of one name.

    Args:
        count: How often it was done.
        total_s: Seconds spent on it in all.
        max_s: Seconds of the slowest one.
    """

    count: int = 0
    total_s: float = 0.0
    max_s: float = 0.0

    @property
    def mean_s(self) -> float:
        """Seconds of the average one; 0 before the first."""
        return self.total_s / self.count if self.count else 0.0


class Timings:
    """Sums of durations by name; one thread or one event loop writes, any may read.

    Args:
        clock: Gives seconds that only rise.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._timings: dict[str, Timing] = {}

    def record(self, name: str, elapsed_s: float) -> None:
        """Add one duration that was measured elsewhere."""
        old = self._timings.get(name, Timing())
        self._timings[name] = Timing(old.count + 1, old.total_s + elapsed_s, max(old.max_s, elapsed_s))

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Time the body of a ``with``, whether it succeeds or not."""
        start = self._clock()
        try:
            yield
        finally:
            self.record(name, self._clock() - start)

    def read(self) -> dict[str, Timing]:
        """Give all sums as they are now, by name."""
        return dict(sorted(self._timings.items()))

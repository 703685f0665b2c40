"""What to do when the person at the terminal, or the machine, asks a command to stop.

Plain signal handlers, because they exist on every platform and an event loop of asyncio wakes up for them on each.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["catch_signals"]


@contextmanager
def catch_signals(callback: Callable[[], None], *signals: signal.Signals) -> Iterator[None]:
    """Call a function instead of ending when a signal comes.

    Args:
        callback: Runs in the main thread between two instructions, so it must do next to nothing.
        *signals: Which.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        callback()

    before = {one: signal.signal(one, handle) for one in signals}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)

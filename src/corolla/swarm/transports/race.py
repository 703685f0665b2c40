"""Trying several ways to one end, each some time after the last, until one leads there. Knows not what the end is."""

from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

import anyio

__all__ = ["race"]

_Prize = TypeVar("_Prize")


async def race(
    attempts: Iterable[Callable[[], Awaitable[_Prize | None]]],
    delay_s: float,
    discard: Callable[[_Prize], Awaitable[None]],
) -> _Prize | None:
    """Start attempts one after another, and give what the first brings that succeeds; the others are cancelled.

    Args:
        attempts: What to try, the best first; each gives ``None`` if it fails.
        delay_s: When to start the next if the last has neither succeeded nor failed, in seconds.
        discard: What to do with a second success, or with the first if the race is cancelled; not cancelled itself.

    Returns:
        The prize, or ``None`` if every attempt failed.
    """
    won: list[_Prize] = []

    async def run(attempt: Callable[[], Awaitable[_Prize | None]], ended: anyio.Event) -> None:
        prize = await attempt()
        ended.set()
        if prize is None:
            return
        won.append(prize)
        tasks.cancel_scope.cancel()

    try:
        async with anyio.create_task_group() as tasks:
            for attempt in attempts:
                ended = anyio.Event()
                tasks.start_soon(run, attempt, ended)
                with anyio.move_on_after(delay_s):
                    await ended.wait()
        return won.pop(0) if won else None
    finally:
        with anyio.CancelScope(shield=True):
            for prize in won:
                await discard(prize)

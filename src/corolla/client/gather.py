"""Several awaitable calls at once, their results in order, their first error as itself."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import anyio

from corolla.errors import Error

__all__ = ["gather"]

_T = TypeVar("_T")


async def gather(
    calls: Sequence[tuple[Callable[..., Awaitable[_T]], tuple[Any, ...]]], *, at_once: int = 8
) -> list[_T]:
    """Run calls at the same time.

    Args:
        calls: Functions and their arguments.
        at_once: How many run at the same time at most.

    Returns:
        Their results, in the order of the calls.

    Raises:
        Error: The first one that any call raised; the others are cancelled.
    """
    results: dict[int, _T] = {}
    failures: list[Error] = []
    limiter = anyio.CapacityLimiter(at_once)

    async def run(index: int, function: Callable[..., Awaitable[_T]], args: tuple[Any, ...]) -> None:
        async with limiter:
            try:
                results[index] = await function(*args)
            except Error as error:
                failures.append(error)
                tasks.cancel_scope.cancel()

    async with anyio.create_task_group() as tasks:
        for index, (function, args) in enumerate(calls):
            tasks.start_soon(run, index, function, args)
    if failures:
        raise failures[0]
    return [results[index] for index in range(len(calls))]

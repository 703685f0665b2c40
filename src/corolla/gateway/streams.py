"""Server-sent events, and what to do when the client has gone."""

import json
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import anyio
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from corolla.errors import Error, ungrouped
from corolla.gateway.failures import answer_error, describe

__all__ = ["Emit", "EventStream", "unless_gone"]

_T = TypeVar("_T")

Emit = Callable[[dict[str, Any]], Awaitable[None]]
"""Sends one event."""

_STALLED_S = 60.0
"""A client that takes nothing for so long has gone."""
_HEARTBEAT_S = 15.0
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # proxies must pass each event on at once
]


class EventStream(Response):
    """An answer in events. What fails before the first one is answered as any other failure.

    Args:
        produce: Makes the events; it is cancelled when the client has gone.
    """

    def __init__(self, produce: Callable[[Emit], Awaitable[None]]) -> None:
        super().__init__()
        self._produce = produce

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events, as ASGI has it."""
        wire = _Wire(send)

        async def produce() -> Error | None:
            try:
                await self._produce(wire.event)
            except Error as error:
                return error
            return None

        is_there, failure = await unless_gone(receive, produce, wire.keep_alive)
        if not is_there:
            return
        if failure is not None and not wire.is_begun:
            await (await answer_error(Request(scope), failure))(scope, receive, send)
            return
        if failure is not None:
            await wire.event(describe(failure))
        await wire.end()


async def unless_gone(
    receive: Receive, function: Callable[[], Awaitable[_T]], *others: Callable[[], Coroutine[Any, Any, None]]
) -> tuple[bool, _T | None]:
    """Run a function, and cancel it when the client has gone.

    Args:
        receive: Where ASGI tells.
        function: What to run.
        *others: What to run beside it, for as long as it does.

    Returns:
        Whether the client is still there, and what the function returned if it is.

    Raises:
        Error: What the function raises.
    """
    result: list[_T] = []

    async def run() -> None:
        result.append(await function())
        tasks.cancel_scope.cancel()

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        tasks.cancel_scope.cancel()

    try:
        with ungrouped():
            async with anyio.create_task_group() as tasks:
                for one in (run, watch, *others):
                    tasks.start_soon(one)
    except* _Stalled:
        result.clear()
    return (True, result[0]) if result else (False, None)


class _Wire:
    """The events of one answer on their way, one at a time."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._lock = anyio.Lock(fast_acquire=True)  # a token waits for no turn of the loop that it need not
        self.is_begun = False

    async def event(self, content: dict[str, Any]) -> None:
        await self._write(f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n")

    async def keep_alive(self) -> None:
        """Write a comment now and then, so that nobody on the way takes a long pause for the end."""
        while True:
            await anyio.sleep(_HEARTBEAT_S)
            if self.is_begun:
                await self._write(": still here\n\n")

    async def end(self) -> None:
        await self._write("data: [DONE]\n\n", is_last=True)

    async def _write(self, text: str, *, is_last: bool = False) -> None:
        async with self._lock:
            if not self.is_begun:
                self.is_begun = True
                await self._send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            body = {"type": "http.response.body", "body": text.encode(), "more_body": not is_last}
            try:
                with anyio.fail_after(_STALLED_S):
                    await self._send(body)
            except TimeoutError as error:
                raise _Stalled from error


class _Stalled(Exception):
    pass

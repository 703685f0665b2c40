"""Pieces of an answer on their way from the thread that makes them to the event loop that tells them.

The thread goes on with the next token while a piece is told, so that telling costs an answer no time; it waits only
when whoever listens has fallen far behind.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final

import anyio

from corolla.gateway.generation import Answer, Piece

__all__ = ["Telling"]

_AHEAD_PIECES: Final = 64


class Telling:
    """The pieces of one answer, told in their order. Made on the event loop that tells them.

    Args:
        tell: Tells one, with the answer so far.
    """

    def __init__(self, tell: Callable[[Answer, Piece], Awaitable[None]]) -> None:
        self._tell = tell
        self._loop = asyncio.get_running_loop()
        self._untold: deque[tuple[Answer, Piece]] = deque()
        self._is_over = False
        self._changed = asyncio.Event()
        self._has_room = asyncio.Event()

    def put(self, answer: Answer, piece: Piece) -> None:
        """Have a piece told soon; called on the thread that made it."""
        self._untold.append((answer, piece))
        self._loop.call_soon_threadsafe(self._changed.set)
        if len(self._untold) > _AHEAD_PIECES:
            anyio.from_thread.run(self._wait_for_room)

    def end(self) -> None:
        """Say that no more will come."""
        self._is_over = True
        self._changed.set()

    async def run(self) -> None:
        """Tell what comes until the end."""
        while self._untold or not self._is_over:
            if not self._untold:
                await self._changed.wait()
                self._changed.clear()
                continue
            await self._tell(*self._untold.popleft())
            self._has_room.set()

    async def _wait_for_room(self) -> None:
        while len(self._untold) > _AHEAD_PIECES:
            self._has_room.clear()
            await self._has_room.wait()

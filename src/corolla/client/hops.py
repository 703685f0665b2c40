"""The hops of a session that stand, the gaps between them, and what they say.

Owns the hops' sessions. Knows nothing of steps.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Final

import anyio

from corolla.client.directory import AsyncSwarm
from corolla.client.hop import HopSession
from corolla.client.target import Target
from corolla.errors import Error, SessionClosed
from corolla.swarm import Received
from corolla.terms import Hop, Span
from corolla.wire import Message, OpenSession, Step

__all__ = ["Hear", "Heard", "Hops"]

_EVENTS: Final = 1024
"""Answers that wait to be looked at; more wait in the network."""
_RESUME_S: Final = 3.0
"""Limit for coming back to a hop whose stream broke: one that lives answers at once."""
_AGAIN_S: Final = 0.3
_AGAIN_AT_MOST_S: Final = 2.0

Heard = Received[Message] | Error
Hear = Callable[[HopSession, Heard], Awaitable[None]]


class Hops:
    """Sessions on servers, by their first block.

    Args:
        swarm: How to reach them.
        target: What they are to run together.

    Attributes:
        target: What they are to run together.
        is_closed: Whether :meth:`close` was called.
    """

    def __init__(self, swarm: AsyncSwarm, target: Target) -> None:
        self.target = target
        self.is_closed = False
        self._swarm = swarm
        self._hops: dict[int, HopSession] = {}
        self._lost: list[HopSession] = []
        self._events: asyncio.Queue[tuple[HopSession, Heard]] = asyncio.Queue(_EVENTS)

    def __iter__(self) -> Iterator[HopSession]:
        """Yield them in order."""
        return iter([self._hops[start] for start in sorted(self._hops)])

    def __contains__(self, session: HopSession) -> bool:
        return self._hops.get(session.hop.span.start) is session

    def get(self, block: int) -> HopSession | None:
        """Give the hop that begins with a block."""
        return self._hops.get(block)

    def before(self, session: HopSession) -> HopSession | None:
        """Give the hop whose outputs go to this one, if there is one."""
        return next((one for one in self if one.hop.span.stop == session.hop.span.start), None)

    def gaps(self) -> Iterator[Span]:
        """Yield the blocks without a hop."""
        begin, end = self.target.span.start, self.target.span.stop
        for start, stop in [*((one.hop.span.start, one.hop.span.stop) for one in self), (end, end)]:
            if begin < start:
                yield Span(begin, start)
            begin = stop

    def add(self, session: HopSession) -> None:
        """Let a hop in, in the place of the one that had its blocks, if there is one."""
        if (old := self._hops.get(session.hop.span.start)) is not None:
            self.lose(old)
        self._hops[session.hop.span.start] = session

    def lose(self, session: HopSession) -> None:
        """Leave a hop; :meth:`close_lost` ends what is left of it."""
        if session in self:  # and not lost before, or closed in another task
            del self._hops[session.hop.span.start]
            self._lost.append(session)

    async def close_lost(self) -> None:
        """End the sessions on hops that were left."""
        if not self._lost:
            return
        lost, self._lost = self._lost, []
        async with anyio.create_task_group() as tasks:
            for session in lost:
                tasks.start_soon(session.close)
        for session in lost:
            self._swarm.forget_load(session.hop.peer)

    async def close(self) -> None:
        """End the session on every hop, and wake whoever waits for one."""
        self.is_closed = True
        for session in self:
            self.lose(session)
            if not self._events.full():
                self._events.put_nowait((session, SessionClosed("the session was closed")))
        await self.close_lost()

    async def open(self, hop: Hop, opening: OpenSession, hear: Hear, failures: list[Error]) -> None:
        """Let a hop in, and hear it.

        Args:
            hop: Which.
            opening: What to ask of it.
            hear: What to do with what it says.
            failures: Where to put how that failed.
        """
        try:
            await self._swarm.equip(hop, self.target)
            session = await HopSession.open(hop, self._swarm.dial(hop), opening, limit_s=self._swarm.config.open_s)
        except Error as error:
            error.peer = error.peer or hop.peer
            failures.append(error)
            return
        self._swarm.praise(hop.peer)
        self.add(session)
        self._swarm.start(session.listen, hear)
        if self.is_closed:
            self.lose(session)
            await self.close_lost()
            failures.append(SessionClosed("the session was closed while its hops were opened"))

    async def expect(self, session: HopSession, token: bytes, failures: list[Error]) -> None:
        """Let another hop feed one; leave it if it cannot be told.

        Args:
            session: Whom to feed.
            token: What the other knows.
            failures: Where to put how that failed.
        """
        try:
            await session.expect(token, self._swarm.config.open_s)
        except Error as error:
            self.lose(session)
            failures.append(error)

    # What they say

    async def hear(self, session: HopSession, heard: Heard) -> None:
        """Take what a hop says, or how it failed."""
        await self._events.put((session, heard))

    async def next(self) -> tuple[HopSession, Heard]:
        """Wait for what any hop says."""
        return await self._events.get()

    def forget_steps_of(self, session: HopSession) -> None:
        """Pass nothing on that a hop has sent for its last successor."""
        for _ in range(self._events.qsize()):
            heard_of, heard = self._events.get_nowait()
            if heard_of is not session or isinstance(heard, Error) or not isinstance(heard.message, Step):
                self._events.put_nowait((heard_of, heard))

    # Broken streams

    async def resume(self) -> list[tuple[HopSession, int | None]]:
        """Come back to the hops whose streams broke, where the servers still hold the session.

        If no server at all can be reached, it is this machine's own connection that is lost, and is waited for.

        Returns:
            Those that were reached, in order, and for each the last step that it has taken; ``None`` if it holds the
            session no more, so that it is the session that is over and not the server.
        """
        resumed: dict[HopSession, int | None] = {}
        until_s = anyio.current_time() + self._swarm.config.resume_s
        pause_s = _AGAIN_S
        while broken := [one for one in self if one.failure is not None and one.may_resume]:
            async with anyio.create_task_group() as tasks:
                for session in broken:
                    tasks.start_soon(self._resume, session, resumed)
            left_s = until_s - anyio.current_time()
            if resumed or left_s <= 0 or await self._swarm.reaches_anybody(min(_RESUME_S, left_s)):
                break
            await anyio.sleep(min(pause_s, left_s))
            pause_s = min(2 * pause_s, _AGAIN_AT_MOST_S)
        return sorted(resumed.items(), key=lambda found: found[0].hop.span.start)

    async def _resume(self, session: HopSession, resumed: dict[HopSession, int | None]) -> None:
        try:
            resumed[session] = await session.resume(self._swarm.dial(session.hop, is_new=True), limit_s=_RESUME_S)
        except Error as error:
            error.peer = error.peer or session.hop.peer
            if error.retry == "same":
                resumed[session] = None

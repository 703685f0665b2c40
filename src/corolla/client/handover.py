"""A hop that leaves is followed by another, which it gives what it holds: nothing is computed again.

Most of it travels while steps go on; the rest between two steps, when the heir takes the leaving hop's place. If
anything of this fails, the hop stays for as long as it can, and then its successor is given a replay.
"""

import secrets
import time
from typing import TYPE_CHECKING, Final

import anyio

from corolla.client.directory import AsyncSwarm
from corolla.client.hop import HopSession
from corolla.errors import Error, NoChain, PeerTimeout, SessionClosed, UsageError
from corolla.wire import Done

if TYPE_CHECKING:
    from corolla.client.hops import Heard
    from corolla.client.live_chain import LiveChain

__all__ = ["hand_over"]

_CLOSE_S: Final = 5.0


class _Heir:
    """What the heir says before it is one of the hops: which step it stands at."""

    def __init__(self, chain: "LiveChain") -> None:
        self._chain = chain
        self._said = anyio.Event()
        self._failure: Error | None = None
        self._number = -1
        self.is_in = False

    async def hear(self, session: HopSession, heard: "Heard") -> None:
        """Take what it says."""
        if self.is_in:
            await self._chain.hear(session, heard)
            return
        if isinstance(heard, Error):
            self._failure = heard
        elif isinstance(heard.message, Done):
            self._number = heard.message.number
        else:
            return
        self._said.set()

    async def stands_at(self, limit_s: float) -> int:
        """Wait until it says that it holds all that was sent, and of which step that is."""
        with anyio.move_on_after(limit_s) as limit:
            await self._said.wait()
        if limit.cancelled_caught:
            raise PeerTimeout(f"the heir of a session did not get it within {limit_s:g} s")
        if self._failure is not None:
            raise self._failure
        self._said = anyio.Event()
        return self._number


async def hand_over(swarm: AsyncSwarm, chain: "LiveChain", old: HopSession, left_s: float) -> None:
    """Have another server take a hop's place before it is gone.

    Args:
        swarm: Where to find the other.
        chain: Whose hop it is.
        old: The hop that leaves.
        left_s: How long it still serves the session.
    """
    began_s, problem = time.perf_counter(), "it took too long"
    with anyio.move_on_after(left_s):
        try:
            await _move(swarm, chain, old, left_s)
            problem = ""
        except Error as error:
            problem = error.message
    chain.trace.decide(
        "hop not handed over" if problem else "hop handed over",
        leaving=f"{old.hop.peer[:8]}={old.hop.span}",
        elapsed_s=round(time.perf_counter() - began_s, 3),
        why=problem or "its server leaves",
    )


async def _move(swarm: AsyncSwarm, chain: "LiveChain", old: HopSession, left_s: float) -> None:
    router = chain.new_router(frozenset((old.hop.peer,)))
    router.span = old.hop.span
    hop, *more = (await router.find_chain()).hops
    if more:
        raise NoChain(f"no other server has all of blocks {old.hop.span}")
    after = chain.hops.get(hop.span.stop)
    token, next_token = secrets.token_bytes(16), secrets.token_bytes(16)
    following = None if after is None else chain.successor(after.hop, next_token, is_new=False)
    open_s = min(left_s, swarm.config.open_s)
    await swarm.equip(hop, chain.hops.target)
    heir = await HopSession.open(hop, swarm.dial(hop), chain.opening(hop, token, following), limit_s=open_s)
    said = _Heir(chain)
    swarm.start(heir.listen, said.hear)
    try:
        fed = chain.successor(hop, token, is_new=False)
        await old.hand_over(fed, left_s)  # steps go on meanwhile
        await said.stands_at(left_s)
        async with chain.stepping:
            if old not in chain.hops or chain.hops.get(hop.span.stop) is not after or chain.under_way:
                raise SessionClosed("the chain has changed meanwhile")
            await old.hand_over(fed, left_s)
            if (number := await said.stands_at(left_s)) != old.done:
                raise UsageError(f"the heir stands at step {number}, and not {old.done}")
            if after is not None:
                await after.expect(next_token, open_s)
            heir.done, heir.is_restored, said.is_in = number, True, True
            before = chain.hops.before(old)
            chain.replace(old, heir)
            if before is not None:
                await chain.turn(before, fed)
    finally:
        if not said.is_in:
            with anyio.move_on_after(_CLOSE_S, shield=True):
                await heir.close()
    await chain.hops.close_lost()

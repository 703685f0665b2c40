"""A chain that is kept whole: the sessions on its hops, which feed each other, and the log of what the first was sent.

Owns the hops' sessions. Knows nothing of how often to try again, nor of what a step is for.
"""

# N packed tokens, D model width

import asyncio
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import anyio
import torch

from corolla.client.directory import AsyncSwarm, ModelRouter, Target
from corolla.client.hop import HopSession, read_tensors
from corolla.client.ledger import Ledger, Mark
from corolla.client.steps import Answer, Replay, StepTokens, work_done
from corolla.errors import Error, PeerTimeout, SessionClosed
from corolla.replay import replay_tokens
from corolla.routing import Demand
from corolla.swarm import Received
from corolla.telemetry import event, logger
from corolla.terms import Address, Chain, Hop, PeerId, Span
from corolla.wire import Done, Failure, Message, OpenSession, Output, Step, Successor, Timing

__all__ = ["LiveChain"]

_LOG = logger(__name__)
_EVENTS: Final = 1024
"""Answers that wait to be looked at; more wait in the network."""
_LOOK_S: Final = 0.5
"""How often to look, while nothing is heard, whether a hop has stopped to answer pings."""


class _Started(NamedTuple):  # a replay that is under way
    tokens: int
    at_s: float


class LiveChain:
    """The hops of a session.

    A step is sent to the first hop; each sends its output to the next, the last one here. Whoever sends to a hop keeps
    what it sent. A hop that fails leaves a gap: :meth:`find_chain` chooses servers for it, and :meth:`fill` opens
    sessions on them and lets the hop before the gap, or this side before the first, give them what it keeps. The other
    hops hold what they have. In the beginning all is one gap.

    Args:
        swarm: Where to find servers.
        target: Which blocks of which weights to run.
        rows: How many rows the session has.
        max_tokens: How many tokens each row is expected to reach.
        prompt_tokens: How many tokens, over all rows, the first step is expected to have.
        token_bytes: How many bytes the hidden state of a token takes on its way.

    Attributes:
        chain: The hops in order, as they were when there was no gap; ``None`` before.
        replays: What was replayed so far, the latest last.
    """

    def __init__(
        self,
        swarm: AsyncSwarm,
        target: Target,
        *,
        rows: int,
        max_tokens: int,
        prompt_tokens: int = 0,
        token_bytes: float = 0,
    ) -> None:
        self._swarm = swarm
        self._target = target
        self._rows = rows
        self._max_tokens = max_tokens
        self._prompt_tokens = prompt_tokens
        self._token_bytes = token_bytes
        self._hops: dict[int, HopSession] = {}
        self._lost: list[HopSession] = []
        self._replaying: dict[HopSession, _Started] = {}
        self._ledger = Ledger(rows, target.codec, swarm.config.log_bytes)
        self._events: asyncio.Queue[tuple[HopSession, Received[Message] | Error]] = asyncio.Queue(_EVENTS)
        self._is_closed = False
        self._is_untaken = True
        self._passed_s: dict[int, float] = {}  # when each step under way was sent, or last heard of
        self._router = self._new_router()
        self.chain: Chain | None = None
        self.replays: list[Replay] = []

    @property
    def under_way(self) -> int:
        """How many steps some hop has not taken yet."""
        return len(self._ledger.under_way)

    # Steps

    def begin(self) -> Mark:
        """Begin something that :meth:`rollback` can undo; who failed before may be asked again."""
        self._router = self._new_router()
        self._is_untaken = True
        return self._ledger.mark

    async def send(self, tokens: StepTokens, taps: tuple[int, ...]) -> None:
        """Send a step on its way. If that fails, it is sent again when the gap is filled.

        Args:
            tokens: The step.
            taps: Blocks whose outputs are wanted as well.

        Raises:
            Error: If the first hop could not be sent it.
        """
        self._is_untaken = self._is_untaken and not self._ledger.under_way
        step, sent = await self._ledger.write(tokens, taps)
        self._passed_s[step.number] = time.perf_counter()
        await self._send(self._hops[self._target.span.start], step, sent.payload)

    async def answer(self) -> Answer:
        """Wait for what a hop says of a step under way.

        Raises:
            SessionClosed: If the session was closed meanwhile.
            Error: What a server said, or how it failed; it leaves the chain unless the caller is to blame.
        """
        while True:
            session, heard = await self._next()
            if self._hops.get(session.hop.span.start) is not session:
                continue
            if isinstance(heard, Error):
                self._lose(session)
                raise heard
            match heard.message:
                case Step() as step:
                    await self._pass_on(session, step, heard.payload)
                case Failure() as failure:
                    error = failure.error(session.hop.peer)
                    if error.retry != "never":
                        self._lose(session)
                    if session.hop.span.start != self._target.span.start:
                        self._is_untaken = False
                    raise error
                case Output() | Done() as message:
                    if asked := self._ledger.under_way.get(message.number):
                        tensors = self._read(session, asked, heard)
                        self._learn(session.hop, asked, message.timing)
                        self._note_done(session, message.number)
                        return Answer(message.number, session.hop, tensors, message.timing)
                    self._note_done(session, message.number)

    async def rollback(self, mark: Mark) -> None:
        """Undo steps that failed for good.

        Nobody can tell any more what the hops hold, so they leave, unless the first has refused the only step; the next
        step fills the gap.
        """
        self._ledger.restore(mark, is_untaken=self._is_untaken)
        if not self._is_untaken:
            for session in self._in_order():
                self._lose(session)
            await self._close_lost()

    # Gaps: this is the router of whoever tries again

    async def find_chain(self) -> Chain:
        """Choose servers for the gaps, if there are any, between the hops that stand.

        Raises:
            NoChain: If some blocks have no server with room for the session that has not failed in this step.
        """
        sessions = self._in_order()
        is_broken = not (sessions and all(session.is_alive for session in sessions)) or any(self._gaps())
        for session in sessions:
            if not session.is_alive or (is_broken and not session.is_restored):
                self._lose(session)
        await self._close_lost()
        hops = [session.hop for session in self._hops.values()]
        for gap in [*self._gaps()]:
            self._router.span = gap
            hops += (await self._router.find_chain()).hops
        return Chain(tuple(sorted(hops, key=lambda hop: hop.span.start)))

    def blame(self, peer: PeerId, error: Error) -> None:
        """Avoid a peer, as far as the error says."""
        self._router.blame(peer, error)

    async def fill(self, chain: Chain) -> None:
        """Let the hops of a chain in that are new, all at once, and have them fed.

        Raises:
            SessionClosed: If the session was closed meanwhile.
            Error: What a server said, or how it failed.
        """
        new = [hop.span.start not in self._hops for hop in chain.hops]
        if not any(new):
            return
        began = _Started(self._ledger.log.tokens, time.perf_counter())
        self._passed_s.clear()  # what is sent again takes as long as the replay
        after_new = [False, *new[:-1]]
        fed = [one or before for one, before in zip(new, after_new, strict=True)]
        tokens = [secrets.token_bytes(16) if is_fed and index else None for index, is_fed in enumerate(fed)]
        successors = [
            Successor(peer=hop.peer, addresses=self._reachable(hop), token=token or b"", is_new=is_new)
            if token
            else None
            for hop, token, is_new in zip(chain.hops, tokens, new, strict=True)
        ]
        failures: list[Error] = []
        async with anyio.create_task_group() as tasks:
            for hop, token, follower, is_new in zip(chain.hops, tokens, [*successors[1:], None], new, strict=True):
                if is_new:
                    tasks.start_soon(self._open, hop, token, follower, failures)
                elif token:
                    tasks.start_soon(self._expect, self._hops[hop.span.start], token, failures)
        failures.sort(key=lambda error: error.retry != "never")
        for error in failures[1:]:
            self.blame(PeerId(error.peer or ""), error)
        if failures:
            raise failures[0]
        for hop, is_new in zip(chain.hops, new, strict=True):
            if is_new and began.tokens:
                self._replaying[self._hops[hop.span.start]] = began
        self.chain = chain
        await self._feed(chain, new, successors)

    async def close(self) -> None:
        """End the session on every hop. Doing it twice does no harm."""
        self._is_closed = True
        for session in self._in_order():
            self._lose(session)
            if not self._events.full():
                self._events.put_nowait((session, SessionClosed("the session was closed")))  # whoever waits wakes up
        await self._close_lost()

    async def _feed(self, chain: Chain, new: Sequence[bool], successors: Sequence[Successor | None]) -> None:
        """Have whoever is before a gap send what it keeps to the first hop in it."""
        for index, (hop, is_new) in enumerate(zip(chain.hops, new, strict=True)):
            if not is_new or (index and new[index - 1]):
                continue
            successor = successors[index]
            if successor is None:
                for step, payload in self._ledger.log.replay(replay_tokens(self._ledger.log)):
                    await self._send(self._hops[hop.span.start], step, payload)
            else:
                before = self._hops[chain.hops[index - 1].span.start]
                try:
                    await before.redirect(successor, self._swarm.config.open_s)
                except Error:
                    self._lose(before)
                    raise
                self._forget_steps_of(before)

    async def _open(self, hop: Hop, token: bytes | None, successor: Successor | None, failures: list[Error]) -> None:
        opening = OpenSession(
            model=self._target.model,
            span=hop.span,
            rows=self._rows,
            max_tokens=max(self._max_tokens, self._ledger.log.longest),
            codec=self._target.codec,
            token=token,
            successor=successor,
        )
        try:
            session = await HopSession.open(hop, self._swarm.dial(hop), opening, limit_s=self._swarm.config.open_s)
        except Error as error:
            error.peer = error.peer or hop.peer
            failures.append(error)
            return
        self._swarm.praise(hop.peer)
        self._hops[hop.span.start] = session
        self._swarm.start(session.listen, self._hear)
        if self._is_closed:
            self._lose(session)
            await self._close_lost()
            failures.append(SessionClosed("the session was closed while its hops were opened"))

    async def _expect(self, session: HopSession, token: bytes, failures: list[Error]) -> None:
        try:
            await session.expect(token, self._swarm.config.open_s)
        except Error as error:
            self._lose(session)
            failures.append(error)

    async def _send(self, session: HopSession, step: Step, payload: bytes | bytearray | memoryview) -> None:
        try:
            await session.send(step, payload, self._swarm.config.step_s)
        except Error:
            self._lose(session)
            raise

    async def _pass_on(self, session: HopSession, step: Step, payload: memoryview) -> None:
        """Send a hop what the one before it cannot send by itself."""
        follower = self._hops.get(session.hop.span.stop)
        if follower is not None:
            await self._send(follower, step, payload)

    def _forget_steps_of(self, session: HopSession) -> None:
        """Pass nothing on that a hop has sent for its last successor."""
        for _ in range(self._events.qsize()):
            heard_of, heard = self._events.get_nowait()
            if heard_of is not session or isinstance(heard, Error) or not isinstance(heard.message, Step):
                self._events.put_nowait((heard_of, heard))

    async def _hear(self, session: HopSession, heard: Received[Message] | Error) -> None:
        await self._events.put((session, heard))

    async def _next(self) -> tuple[HopSession, Received[Message] | Error]:
        """Wait for what any hop says; if that takes too long, it is the first one whose turn it is that stalls."""
        began_s, limit_s = anyio.current_time(), self._swarm.config.step_s
        while True:
            with anyio.move_on_after(_LOOK_S) as looking:
                found = await self._events.get()
            if self._is_closed:
                raise SessionClosed("the session was closed")
            if not looking.cancelled_caught:
                return found
            stalled = next(one for one in self._in_order() if one.done < min(self._ledger.under_way))
            waited_s = anyio.current_time() - began_s
            if waited_s > limit_s or self._swarm.avoids(Chain((stalled.hop,))):  # or it answers nobody else either
                self._lose(stalled)
                peer = stalled.hop.peer
                raise PeerTimeout(f"peer {peer[:8]} did not answer a step within {waited_s:.0f} s", peer=peer)

    def _note_done(self, session: HopSession, number: int) -> None:
        """Note that a hop has taken a step; one that all have taken is settled."""
        self._is_untaken = False
        if not number:  # of a replay
            return
        session.done = max(session.done, number)
        session.is_restored = True
        if started := self._replaying.pop(session, None):
            elapsed_s = time.perf_counter() - started.at_s
            self.replays.append(Replay(session.hop, started.tokens, elapsed_s))
            words = f"{session.hop.peer[:8]}={session.hop.span}"
            event(_LOG, "replaced", by=words, tokens=started.tokens, elapsed_s=round(elapsed_s, 3))
        done = min(one.done for one in self._hops.values())
        self._ledger.settle(done)
        self._passed_s = {step: at_s for step, at_s in self._passed_s.items() if step > done}

    def _read(self, session: HopSession, step: Step, heard: Received[Message]) -> list[torch.Tensor]:
        """Decode what came with an answer."""
        hop = session.hop
        count = sum(block in hop.span for block in step.taps) + (hop.span.stop == self._target.span.stop)
        try:
            return read_tensors(heard, shape=step.hidden.shape, count=count, peer=hop.peer)
        except Error:
            self._lose(session)
            raise

    def _learn(self, hop: Hop, step: Step, timing: Timing) -> None:
        """Take into account what a hop says of its time, and how long that was; how far away it is, pings tell."""
        now_s = time.perf_counter()
        passed_s = self._passed_s.get(step.number)
        self._passed_s[step.number] = now_s
        work = work_done(hop, step, timing, None if passed_s is None else now_s - passed_s)
        self._swarm.learn(hop.peer, work)

    def _reachable(self, hop: Hop) -> tuple[Address, ...]:
        """Where other hops may dial a hop."""
        return hop.addresses if self._swarm.config.push else ()

    def _in_order(self) -> list[HopSession]:
        return [self._hops[start] for start in sorted(self._hops)]

    def _gaps(self) -> Iterator[Span]:
        """Yield the blocks without a hop."""
        begin, end = self._target.span.start, self._target.span.stop
        for start, stop in [*((one.hop.span.start, one.hop.span.stop) for one in self._in_order()), (end, end)]:
            if begin < start:
                yield Span(begin, start)
            begin = stop

    def _lose(self, session: HopSession) -> None:
        self._is_untaken = False
        self._replaying.pop(session, None)
        if self._hops.get(session.hop.span.start) is session:  # and not lost before, or closed in another task
            del self._hops[session.hop.span.start]
            self._lost.append(session)

    async def _close_lost(self) -> None:
        lost, self._lost = self._lost, []
        async with anyio.create_task_group() as tasks:
            for session in lost:
                tasks.start_soon(session.close)

    def _new_router(self) -> ModelRouter:
        row_tokens = max(self._max_tokens, self._ledger.log.longest)
        prompt_tokens = max(self._prompt_tokens, self._ledger.log.tokens)
        demand = Demand(
            model=self._target.model,
            span=self._target.span,
            tokens=self._rows * row_tokens,
            prompt_tokens=prompt_tokens,
            decode_steps=max(1, self._max_tokens - prompt_tokens // self._rows),
            rows=self._rows,
            token_bytes=self._token_bytes,
            is_pushed=self._swarm.config.push,
        )
        return ModelRouter(self._swarm, demand)

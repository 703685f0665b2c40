"""A chain that is kept whole: its hops feed each other, and what the first was sent is written down.

Fills gaps, and moves what a leaving server holds. Knows nothing of how often to try again, nor of what a step is for.
"""

# N packed tokens, D model width

import asyncio
import secrets
import time
from collections.abc import Sequence
from typing import Final, NamedTuple

import anyio
import torch

from corolla.client.directory import AsyncSwarm, ModelRouter
from corolla.client.handover import hand_over
from corolla.client.hop import HopSession, read_tensors
from corolla.client.hops import Heard, Hops
from corolla.client.ledger import Ledger, Mark
from corolla.client.need import Need
from corolla.client.steps import Answer, Pace, Replay, StepTokens
from corolla.client.trace import Trace
from corolla.errors import Error, NotFinite, PeerFailed, PeerLost, PeerMisbehaved, PeerTimeout, SessionClosed
from corolla.replay import replay_tokens
from corolla.swarm import Received
from corolla.terms import Chain, Hop, PeerId
from corolla.wire import Buffer, Done, Failure, Leaving, Message, OpenSession, Output, Step, Successor

__all__ = ["LiveChain"]

_LOOK_S: Final = 0.5
"""How often to look, while nothing is heard, whether a hop has stopped to answer pings."""
_REACH_S: Final = 2.0
"""How long a server may take to answer, when it is asked whether this machine's connection is lost."""


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
        need: What the session asks for.

    Attributes:
        chain: The hops in order, as they were when there was no gap; ``None`` before.
        hops: The sessions on them.
        replays: What was replayed so far, the latest last.
        stepping: Held while a step is taken, or a hop handed over.
        trace: What was decided.
    """

    def __init__(self, swarm: AsyncSwarm, need: Need) -> None:
        self._swarm = swarm
        self._need = need
        self._target = need.target
        self._replaying: dict[HopSession, _Started] = {}
        self._ledger = Ledger(need.rows, need.target.codec, swarm.config.log_bytes)
        self._is_untaken = True
        self._pace = Pace()
        self._chooser: ModelRouter | None = None
        self.chain: Chain | None = None
        self.hops = Hops(swarm, need.target)
        self.replays: list[Replay] = []
        self.stepping = asyncio.Lock()
        self.trace = Trace()

    @property
    def under_way(self) -> int:
        """How many steps some hop has not taken yet."""
        return len(self._ledger.under_way)

    # Steps

    def begin(self) -> Mark:
        """Begin something that :meth:`rollback` can undo; who failed before may be asked again."""
        self._chooser = None
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
        self._pace.begin(step.number)
        await self._send(self._first, step, sent.payload)

    async def answer(self) -> Answer:
        """Wait for what a hop says of a step under way.

        Raises:
            SessionClosed: If the session was closed meanwhile.
            Error: What a server said, or how it failed; it leaves the chain unless the caller is to blame.
        """
        while True:
            session, heard = await self._next()
            if session not in self.hops:
                continue
            if isinstance(heard, Error):
                if session.is_alive:  # on another stream by now
                    continue
                self._is_untaken = False
                raise heard
            match heard.message:
                case Step() as step:
                    await self._pass_on(session, step, heard.payload)
                case Failure() as failure:
                    raise self._refusal(session, failure)
                case Output() | Done() as message if not 0 < message.number <= session.done:  # else it came twice
                    if answer := self._answer(session, message, heard):
                        return answer

    def _answer(self, session: HopSession, message: Output | Done, heard: Received[Message]) -> Answer | None:
        """Note that a hop has taken a step; give what it says of it, unless that is of a replay."""
        if self._ledger.skips(session.done, message.number):
            self._lose(session)
            raise PeerMisbehaved(f"step {message.number} was answered out of turn", peer=session.hop.peer)
        asked = self._ledger.under_way.get(message.number)
        tensors = self._read(session, asked, heard) if asked else []
        if asked:
            self._swarm.learn(session.hop.peer, self._pace.work(session.hop, asked, message))
        self._note_done(session, message.number)
        return Answer(message.number, session.hop, tensors, message.timing) if asked else None

    def _refusal(self, session: HopSession, failure: Failure) -> Error:
        """Say what a hop has refused; it leaves the chain unless the caller is to blame."""
        error: Error = failure.error(session.hop.peer)
        if isinstance(error, NotFinite):
            session, error = self._culprit(session, error)
        if error.retry != "never":
            self._lose(session)
        if session.hop.span.start != self._target.span.start:
            self._is_untaken = False
        return error

    def _culprit(self, session: HopSession, error: NotFinite) -> tuple[HopSession, Error]:
        """Say who is to blame if a hop says that it was fed what no honest server sends: one of the two.

        Which of them cannot be told, so neither is blamed for long; but for the first hop, which this side feeds.
        """
        before = self.hops.before(session)
        if before is None:
            peer = session.hop.peer
            return session, PeerMisbehaved(f"peer {peer[:8]} refuses what is in order: {error.message}", peer=peer)
        peer = before.hop.peer
        return before, PeerFailed(f"peer {peer[:8]} fed the next hop what are no numbers: {error.message}", peer=peer)

    async def rollback(self, mark: Mark) -> None:
        """Undo steps that failed for good.

        Nobody can tell any more what the hops hold, so they leave, unless the first has refused the only step; the next
        step fills the gap.
        """
        self._ledger.restore(mark, is_untaken=self._is_untaken)
        if not self._is_untaken:
            for session in self.hops:
                self._lose(session)
            await self.hops.close_lost()

    # Gaps: this is the router of whoever tries again

    async def find_chain(self) -> Chain:
        """Choose servers for the gaps, if there are any, between the hops that stand.

        Raises:
            NoChain: If some blocks have no server with room for the session that has not failed in this step.
        """
        await self._resume()
        sessions = [*self.hops]
        is_broken = not (sessions and all(session.is_alive for session in sessions)) or any(self.hops.gaps())
        for session in sessions:
            if not session.is_alive or (is_broken and not session.is_restored):
                why = session.failure.message if session.failure else "it has stored nothing yet"
                self.trace.decide("hop left", peer=session.hop.peer[:8], why=why)
                self._lose(session)
        await self.hops.close_lost()
        hops = [session.hop for session in self.hops]
        for gap in [*self.hops.gaps()]:
            self._router.span = gap
            hops += (await self._router.find_chain()).hops
        return Chain(tuple(sorted(hops, key=lambda hop: hop.span.start)))

    def blame(self, peer: PeerId, error: Error) -> None:
        """Avoid a peer, as far as the error says."""
        self.trace.decide("hop failed", peer=peer[:8], code=error.code, banned_s=error.ban_s, why=error.message)
        self._router.blame(peer, error)

    async def fill(self, chain: Chain) -> None:
        """Let the hops of a chain in that are new, all at once, and have them fed.

        Raises:
            SessionClosed: If the session was closed meanwhile.
            Error: What a server said, or how it failed.
        """
        new = [self.hops.get(hop.span.start) is None for hop in chain.hops]
        if not any(new):
            return
        began = _Started(self._ledger.log.tokens, time.perf_counter())
        self._pace.forget()  # what is sent again takes as long as the replay
        after_new = [False, *new[:-1]]
        fed = [one or before for one, before in zip(new, after_new, strict=True)]
        tokens = [secrets.token_bytes(16) if is_fed and index else None for index, is_fed in enumerate(fed)]
        successors = [
            self.successor(hop, token, is_new=is_new) if token else None
            for hop, token, is_new in zip(chain.hops, tokens, new, strict=True)
        ]
        failures: list[Error] = []
        async with anyio.create_task_group() as tasks:
            for hop, token, follower, is_new in zip(chain.hops, tokens, [*successors[1:], None], new, strict=True):
                if is_new:
                    tasks.start_soon(self.hops.open, hop, self.opening(hop, token, follower), self.hear, failures)
                elif token and (session := self.hops.get(hop.span.start)):
                    tasks.start_soon(self.hops.expect, session, token, failures)
        failures.sort(key=lambda error: error.retry != "never")
        for error in failures[1:]:
            self.blame(PeerId(error.peer or ""), error)
        if failures:
            raise failures[0]
        if self.hops.is_closed:
            raise SessionClosed("the session was closed")
        for session, is_new in zip(self.hops, new, strict=True):
            if is_new and began.tokens:
                self._replaying[session] = began
        self.chain = chain
        chosen = [f"{hop.peer[:8]}={hop.span}" for hop, is_new in zip(chain.hops, new, strict=True) if is_new]
        self.trace.decide("hops chosen", hops=" ".join(chosen), replayed_tokens=began.tokens, why=self._router.reason)
        await self._feed(new, successors)

    def replace(self, old: HopSession, heir: HopSession) -> None:
        """Let a server that holds what another did take its place."""
        self.hops.add(heir)
        self._replaying.pop(old, None)
        self.chain = Chain(tuple(session.hop for session in self.hops))

    async def close(self) -> None:
        """End the session on every hop. Doing it twice does no harm."""
        await self.hops.close()

    def opening(self, hop: Hop, token: bytes | None, successor: Successor | None) -> OpenSession:
        """Say what to ask of a hop."""
        return self._need.opening(hop, self._ledger.log.longest, token, successor, self.trace.context)

    async def hear(self, session: HopSession, heard: Heard) -> None:
        """Take what a hop says."""
        if not isinstance(heard, Error) and isinstance(heard.message, Leaving):
            self._swarm.start(hand_over, self._swarm, self, session, heard.message.left_s)
        else:
            await self.hops.hear(session, heard)

    async def turn(self, session: HopSession, successor: Successor) -> None:
        """Let a hop feed another one from now on.

        Raises:
            Error: If it could not be told; it is left.
        """
        try:
            await session.redirect(successor, self._swarm.config.open_s)
        except Error:
            self._lose(session)
            raise
        self.hops.forget_steps_of(session)

    async def _resume(self) -> None:
        """Come back to hops whose streams broke, and have them given the steps that they may lack."""
        for session, taken in await self.hops.resume():
            self._router.forgive(session.hop.peer)
            if taken is None:
                continue
            self._swarm.start(session.listen, self.hear)
            self.trace.decide("stream resumed", peer=session.hop.peer[:8], taken=taken)
            before = self.hops.before(session)
            try:
                if session.hop.span.start == self._target.span.start:
                    for step, payload in [*self._ledger.log.recent()]:
                        if step.number > taken:
                            await self._send(session, step, payload)
                elif before is not None and before.is_alive:
                    await self.turn(before, self.successor(session.hop, session.token or b"", is_new=False))
            except Error as error:
                self._lose(session)
                self.blame(session.hop.peer, error)

    async def _feed(self, new: Sequence[bool], successors: Sequence[Successor | None]) -> None:
        """Have whoever is before a gap send what it keeps to the first hop in it."""
        sessions = [*self.hops]
        for index, (session, is_new) in enumerate(zip(sessions, new, strict=True)):
            if not is_new or (index and new[index - 1]):
                continue
            successor = successors[index]
            if successor is None:
                for step, payload in self._ledger.log.replay(replay_tokens(self._ledger.log)):
                    await self._send(session, step, payload)
            else:
                await self.turn(sessions[index - 1], successor)

    async def _send(self, session: HopSession, step: Step, payload: Buffer) -> None:
        try:
            await session.send(step, payload, self._swarm.config.step_s)
        except Error:
            self._is_untaken = False
            raise

    async def _pass_on(self, session: HopSession, step: Step, payload: memoryview) -> None:
        """Send a hop what the one before it cannot send by itself."""
        if (follower := self.hops.get(session.hop.span.stop)) is not None:
            await self._send(follower, step, payload)

    async def _next(self) -> tuple[HopSession, Received[Message] | Error]:
        """Wait for what any hop says; if that takes too long, it is the first one whose turn it is that stalls."""
        began_s, limit_s = anyio.current_time(), self._swarm.config.step_s
        while True:
            with anyio.move_on_after(_LOOK_S) as looking:
                found = await self.hops.next()
            if self.hops.is_closed:
                raise SessionClosed("the session was closed")
            if not looking.cancelled_caught:
                return found
            stalled = next(one for one in self.hops if one.done < min(self._ledger.under_way))
            waited_s, peer = anyio.current_time() - began_s, stalled.hop.peer
            if waited_s > limit_s or self._swarm.avoids(Chain((stalled.hop,))):  # or it answers nobody else either
                if await self._swarm.reaches_anybody(_REACH_S):
                    self._lose(stalled)
                    raise PeerTimeout(f"peer {peer[:8]} did not answer a step within {waited_s:.0f} s", peer=peer)
                for session in self.hops:
                    session.failure = session.failure or PeerLost("nobody can be reached", peer=session.hop.peer)
                self._is_untaken = False
                raise PeerLost(f"nobody could be reached any more after {waited_s:.0f} s of waiting", peer=peer)

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
            by = f"{session.hop.peer[:8]}={session.hop.span}"
            self.trace.decide("replaced", by=by, tokens=started.tokens, elapsed_s=round(elapsed_s, 3))
        done = min(one.done for one in self.hops)
        self._ledger.settle(done)
        self._pace.settle(done)

    def _read(self, session: HopSession, step: Step, heard: Received[Message]) -> list[torch.Tensor]:
        """Decode what came with an answer."""
        hop = session.hop
        count = sum(block in hop.span for block in step.taps) + (hop.span.stop == self._target.span.stop)
        try:
            return read_tensors(heard, shapes=[step.hidden.shape] * count, peer=hop.peer, is_finite=True)
        except Error:
            self._lose(session)
            raise

    def successor(self, hop: Hop, token: bytes, *, is_new: bool) -> Successor:
        """Say how a hop is fed by the one before it."""
        addresses = hop.addresses if self._swarm.config.push else ()
        return Successor(peer=hop.peer, addresses=addresses, token=token, is_new=is_new)

    @property
    def _router(self) -> ModelRouter:
        """What chooses servers in the present step, made when there is something to choose."""
        self._chooser = self._chooser or self.new_router()
        return self._chooser

    @property
    def _first(self) -> HopSession:
        if (session := self.hops.get(self._target.span.start)) is None:
            raise SessionClosed("the session was closed")
        return session

    def _lose(self, session: HopSession) -> None:
        self._is_untaken = False
        self._replaying.pop(session, None)
        self.hops.lose(session)

    def new_router(self, avoid: frozenset[PeerId] = frozenset()) -> ModelRouter:
        """Make what chooses servers for the session, other than these."""
        log, is_pushed = self._ledger.log, self._swarm.config.push
        demand = self._need.demand(log.longest, log.tokens, is_pushed=is_pushed, avoid=avoid)
        return ModelRouter(self._swarm, demand)

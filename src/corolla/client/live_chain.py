"""A chain that is kept whole: the sessions on its hops, and the logs from which lost ones are given to others.

Owns the hops' sessions and the logs. Knows nothing of how often to try again, nor of what a step is for.
"""

# N packed tokens, D model width

import time
from collections.abc import Iterator, Mapping

import anyio
import torch
from msgspec import structs

from corolla.client.directory import AsyncSwarm, ModelRouter, Target
from corolla.client.hop import HopSession
from corolla.client.steps import HopTiming, Replay, StepTokens
from corolla.codec import encode
from corolla.errors import Error, SessionClosed
from corolla.replay import Log, Sent, Store
from corolla.replay.log import Trail
from corolla.routing import Demand, Work
from corolla.telemetry import event, logger
from corolla.terms import Chain, Hop, PeerId, Span
from corolla.wire import OpenSession, Step
from corolla.wire.limits import MAX_PAYLOAD_BYTES

__all__ = ["LiveChain", "Marks"]

_LOG = logger(__name__)
_REPLAY_TOKENS = 1024
"""Tokens in one step of a replay: few enough to begin soon, enough to be computed as fast as a prompt."""

Marks = Mapping[int, tuple[Trail | None, ...]]
"""What the logs told at some time, by their hops' first blocks."""


class LiveChain:
    """The hops of a session, and what each has been sent.

    A hop that fails leaves a gap. :meth:`find_chain` chooses servers for it and :meth:`fill` lets them in; the other
    hops keep what they hold. In the beginning all is one gap. Where a gap begins there is a log, so it can be filled.

    Args:
        swarm: Where to find servers.
        target: Which blocks of which weights to run.
        rows: How many rows the session has.
        max_tokens: How many tokens each row is expected to reach.
        prompt_tokens: How many tokens, over all rows, the first step is expected to have.
        token_bytes: How many bytes the hidden state of a token takes on its way.

    Attributes:
        at: The block that the step under way has reached. No new hop may span it, since the blocks on its two sides
            have seen different tokens.
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
        self._logs: dict[int, Log] = {target.span.start: Log(rows)}
        self._store = Store(swarm.config.log_bytes)
        self._lost: list[HopSession] = []
        self._is_closed = False
        self._router = self._new_router()
        self.at = target.span.start
        self.replays: list[Replay] = []

    @property
    def chain(self) -> Chain | None:
        """The hops in order; ``None`` while there is none."""
        return Chain(tuple(session.hop for session in self._in_order())) if self._hops else None

    # Steps

    def begin(self) -> Marks:
        """Begin a step: who failed in an earlier one may be asked again.

        Returns:
            What :meth:`rollback` needs to undo it.
        """
        self._router = self._new_router()
        return {start: log.rows for start, log in self._logs.items()}

    async def step(
        self, tokens: StepTokens, hidden_ND: torch.Tensor, taps: tuple[int, ...]
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor], HopTiming]:
        """Run tokens through the hop that the step has reached, and write them down once the hop has taken them.

        Args:
            tokens: Which tokens.
            hidden_ND: What the hop's first block gets of them.
            taps: Blocks whose outputs are wanted as well, if they are among the hop's.

        Raises:
            Error: What the server said, or how it failed; it leaves the chain unless the caller is to blame.
        """
        session = self._hops[self.at]
        hop = session.hop
        wanted = tuple(block for block in taps if block in hop.span)
        began_s = time.perf_counter()
        sent = self._keep(hidden_ND)
        step = Step(starts=tokens.starts, counts=tokens.counts, order=tokens.order, taps=wanted, hidden=sent.meta)
        try:
            (output_ND, *tapped), timing = await session.step(step, sent.payload)
        except Error as error:
            if error.retry != "never" or not session.is_open:
                self._lose(session)
            raise
        self._logs[self.at].note(step, sent)
        self.at = hop.span.stop if hop.span.stop < self._target.span.stop else self._target.span.start
        spent = HopTiming(hop, time.perf_counter() - began_s, timing.queue_s, timing.compute_s)
        work = Work(
            blocks=len(hop.span),
            tokens=sum(tokens.counts),
            is_decode=max(tokens.counts) == 1,
            nbytes=(2 + len(wanted)) * sent.meta.nbytes,
            total_s=spent.total_s,
            queue_s=spent.queue_s,
            compute_s=spent.compute_s,
        )
        self._swarm.learn(hop.peer, work)
        await self._store.settle()
        return output_ND, dict(zip(wanted, tapped, strict=True)), spent

    async def rollback(self, marks: Marks) -> None:
        """Undo a step that some hops have taken and others never will.

        What those hops hold is not what their logs tell any more, so they leave; the next step fills the gaps.
        """
        for start, log in [*self._logs.items()]:
            if log.rows is marks.get(start):
                continue
            if start in self._hops:
                self._lose(self._hops[start])
            if start in marks:
                log.rows = marks[start]
            else:
                del self._logs[start]
        self.at = self._target.span.start
        while unfounded := next((gap for gap in self._gaps() if gap.start not in self._logs), None):
            self._lose(next(session for session in self._hops.values() if session.hop.span.stop == unfounded.start))
        await self._close_lost()

    # Gaps: this is the router of whoever tries again

    async def find_chain(self) -> Chain:
        """Choose servers for the gaps, if there are any, between the hops that stand.

        Raises:
            NoChain: If some blocks have no server with room for the session that has not failed in this step.
        """
        for session in self._in_order():
            if not session.is_alive:
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
        """Open sessions on the hops of a chain that are new, all at once, and give them what their logs tell.

        Raises:
            SessionClosed: If the session was closed meanwhile.
            Error: What a server said, or how it failed. Those that did not fail stay.
        """
        failures: list[Error] = []
        async with anyio.create_task_group() as tasks:
            for hop in chain.hops:
                if hop.span.start not in self._hops:
                    tasks.start_soon(self._open, hop, failures)
        failures.sort(key=lambda error: error.retry != "never")
        for error in failures[1:]:
            self.blame(PeerId(error.peer or ""), error)
        if failures:
            raise failures[0]
        await self._restore()

    async def close(self) -> None:
        """End the session on every hop. Doing it twice does no harm."""
        self._is_closed = True
        for session in self._in_order():
            self._lose(session)
        await self._close_lost()

    async def _open(self, hop: Hop, failures: list[Error]) -> None:
        config = self._swarm.config
        opening = OpenSession(
            model=self._target.model,
            span=hop.span,
            rows=self._rows,
            max_tokens=self._room_tokens(),
            codec=self._target.codec,
        )
        try:
            session = await HopSession.open(
                hop, self._swarm.dial(hop), opening, open_s=config.open_s, step_s=config.step_s
            )
        except Error as error:
            error.peer = error.peer or hop.peer
            failures.append(error)
            return
        self._swarm.praise(hop.peer)
        self._hops[hop.span.start] = session
        if self._is_closed:
            self._lose(session)
            await self._close_lost()
            failures.append(SessionClosed("the session was closed while its hops were opened"))

    async def _restore(self) -> None:
        """Replay to every hop that is new what its log tells; a log that is missing comes from the hop before."""
        sessions = self._in_order()
        for session, follower in zip(sessions, [*sessions[1:], None], strict=True):
            if session.is_restored:
                continue
            fed = Log(self._rows) if follower and follower.hop.span.start not in self._logs else None
            try:
                await self._replay(session, fed)
            except Error:
                self._lose(session)
                raise
            session.is_restored = True
            if follower and fed:
                self._logs[follower.hop.span.start] = fed
        self._logs = {start: self._logs[start] for start in self._hops}

    async def _replay(self, session: HopSession, fed: Log | None) -> None:
        """Give a hop what its log tells, and write down what comes out for the next hop, if that has no log."""
        began_s = time.perf_counter()
        log = self._logs[session.hop.span.start]
        if not log.tokens:
            return
        for step, encoded in log.replay(_limit_tokens(log)):
            outputs, _ = await session.step(structs.replace(step, is_quiet=fed is None), b"".join(encoded.buffers))
            if fed is not None:
                sent = self._keep(outputs[0])
                fed.note(structs.replace(step, hidden=sent.meta), sent)
                await self._store.settle()
        replay = Replay(session.hop, log.tokens, time.perf_counter() - began_s)
        self.replays.append(replay)
        event(
            _LOG,
            "replayed",
            peer=session.hop.peer[:8],
            span=session.hop.span,
            tokens=replay.tokens,
            elapsed_s=round(replay.elapsed_s, 3),
        )

    def _keep(self, hidden_ND: torch.Tensor) -> Sent:
        encoded = encode(hidden_ND, self._target.codec)
        return self._store.keep(encoded.meta, encoded.buffers)

    def _in_order(self) -> list[HopSession]:
        return [self._hops[start] for start in sorted(self._hops)]

    def _gaps(self) -> Iterator[Span]:
        """Yield the blocks without a hop, cut where the step stands."""
        begin, end = self._target.span.start, self._target.span.stop
        for start, stop in [*((one.hop.span.start, one.hop.span.stop) for one in self._in_order()), (end, end)]:
            for first, last in ((begin, min(start, self.at)), (max(begin, self.at), start)):
                if first < last:
                    yield Span(first, last)
            begin = stop

    def _lose(self, session: HopSession) -> None:
        if self._hops.get(session.hop.span.start) is session:  # and not lost before, or closed in another task
            del self._hops[session.hop.span.start]
            self._lost.append(session)

    async def _close_lost(self) -> None:
        lost, self._lost = self._lost, []
        async with anyio.create_task_group() as tasks:
            for session in lost:
                tasks.start_soon(session.close)

    def _new_router(self) -> ModelRouter:
        prompt_tokens = max(self._prompt_tokens, *(log.tokens for log in self._logs.values()))
        demand = Demand(
            model=self._target.model,
            span=self._target.span,
            tokens=self._rows * self._room_tokens(),
            prompt_tokens=prompt_tokens,
            decode_steps=max(1, self._max_tokens - prompt_tokens // self._rows),
            rows=self._rows,
            token_bytes=self._token_bytes,
        )
        return ModelRouter(self._swarm, demand)

    def _room_tokens(self) -> int:
        """How many tokens a row needs room for."""
        return max(self._max_tokens, *(log.longest for log in self._logs.values()))


def _limit_tokens(log: Log) -> int:
    """Say how many of a log's tokens may be replayed in one step, and their outputs come back, whatever the codec."""
    width = next(row.sent.meta.shape[1] for row in log.rows if row is not None)
    return max(1, min(_REPLAY_TOKENS, MAX_PAYLOAD_BYTES // (4 * width)))

"""A session on a server: where its steps come from, and where what becomes of them goes.

Steps come from the client, or from the hop before on a stream of its own; they are taken one after another. Outputs go
to the hop behind, and what was sent there is kept, so that another can be given it; the client hears of every step. A
client whose stream breaks may come back on another one.
"""

# N packed tokens

import asyncio
import time
from typing import Final

import anyio
import torch
from anyio.abc import TaskGroup
from msgspec import structs

from corolla.codec import all_finite, count_not_finite, encode
from corolla.engine import Engine, Result, SessionRows
from corolla.errors import Error, NotFinite, PeerTimeout, RemoteProtocolError, SessionExpired, UsageError, ungrouped
from corolla.replay import Log, replay_tokens
from corolla.server.handover import Handover, take_over_rows
from corolla.server.limits import Holding
from corolla.server.line import Line
from corolla.server.outlet import FeedTo, Outlet
from corolla.server.tensors import check_finite, decode_tensors, encode_tensors
from corolla.swarm import Channel, Received
from corolla.telemetry import event, logger
from corolla.telemetry.spans import begin_span
from corolla.wire import (
    Ack,
    Buffer,
    Closed,
    CloseSession,
    Done,
    Expect,
    Failure,
    Feed,
    HandedOver,
    HandOver,
    Leaving,
    Load,
    Message,
    OpenSession,
    Output,
    Redirect,
    Redirected,
    Restore,
    Restored,
    SessionState,
    Step,
    Successor,
    Timing,
)

__all__ = ["ServedSession"]

_LOG = logger(__name__)
_WAITING_STEPS: Final = 8
"""Steps that wait for their turn; more wait in the network."""


class ServedSession:
    """One session, from when it is opened until it is closed, its client is lost, or its lease ends.

    Args:
        line: The client's stream.
        opening: What the client asked for.
        engine: What computes.
        rows: What the session holds there.
        outlet: What it sends with.

    Attributes:
        token: What whoever feeds it must know.
        line: The client's stream.
        engine: What computes.
        rows: What the session holds there.
        taken: The last step that was taken.
    """

    def __init__(self, line: Line, opening: OpenSession, engine: Engine, rows: SessionRows, outlet: Outlet) -> None:
        self.token = opening.token
        self.line = line
        self.engine = engine
        self.rows = rows
        self._opening = opening
        self._outlet = outlet
        self.taken = 0
        self._waiting: asyncio.Queue[Received[Message]] = asyncio.Queue(_WAITING_STEPS)
        self._feeding = anyio.CancelScope()
        self._pushing = anyio.CancelScope()
        self._idle_since_s: float | None = anyio.current_time()
        self._expiry = anyio.Event()
        self._expired = ""
        self._feed = FeedTo(outlet, opening.successor) if opening.successor else None
        self._log = Log(opening.rows)
        self._resting = asyncio.Lock()
        self._handover: Handover | None = None
        self._is_handing_over = False
        blocks = {"blocks": str(opening.span), "rows": opening.rows}
        self._span = begin_span("hop", blocks, above=opening.trace) if opening.trace else None

    async def run(self, lease_s: float) -> None:
        """Take steps until the session is over.

        Raises:
            Error: What ended it, other than the client's wish.
        """
        ended: Error | None = None
        try:
            with ungrouped():
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self._listen, tasks)
                    tasks.start_soon(self._watch_lease, lease_s)
                    await self._work()
                    tasks.cancel_scope.cancel()
        except Error as error:
            ended = error
            raise
        finally:
            if self._span is not None:
                self._span.end({"steps": self.taken, "ended_by": ended.code if ended else ""})
            self.line.end(ended)
            self._feeding.cancel()
            if self._feed is not None:
                await self._feed.hang_up()
            if self._handover is not None:
                await self._handover.feed.hang_up()

    async def be_fed(self, channel: Channel) -> None:
        """Take steps from the hop before, until its stream ends or another one feeds the session.

        Raises:
            Error: If what comes is no step of the session.
        """
        self._feeding.cancel()
        state = SessionState("server")
        state.received(Feed(token=self.token or b""))
        state.rows = self._opening.rows
        state.sent(Ack())
        with anyio.CancelScope() as self._feeding:
            await channel.send(Ack())
            async for received in channel:
                state.received(received.message)
                await self._waiting.put(received)

    @property
    def holding(self) -> Holding:
        """What it holds."""
        silent_s = 0.0 if self._idle_since_s is None else anyio.current_time() - self._idle_since_s
        return Holding(self.line.peer, self.rows.lease.claim_pages, silent_s)

    def expire(self, why: str = "") -> None:
        """End the lease at once, unless a step is computed."""
        self._expired = why
        self._expiry.set()

    async def leave(self, left_s: float) -> None:
        """Tell the client that this server leaves.

        Args:
            left_s: How long it still serves.
        """
        await self.line.tell(Leaving(left_s=left_s))

    async def _listen(self, tasks: TaskGroup) -> None:
        """Hear the client, also while a step is computed."""
        while True:
            received = await self.line.receive()
            match received.message:
                case Expect() as expect:
                    self.token = expect.token
                    self._feeding.cancel()
                    await self.line.tell(Ack())
                    continue
                case HandOver() as wish:
                    if self._is_handing_over:
                        raise RemoteProtocolError("a session was to be handed over while it is handed over")
                    self._is_handing_over = True
                    tasks.start_soon(self._hand_over, wish.heir)
                    continue
                case Redirect():
                    self._pushing.cancel()
            await self._waiting.put(received)
            if isinstance(received.message, CloseSession):
                return

    async def _watch_lease(self, lease_s: float) -> None:
        """End the session when nothing was heard of it for so long.

        Watches from aside, so that a step need not set a timer.
        """
        while True:
            since_s = self._idle_since_s
            left_s = lease_s if since_s is None else since_s + lease_s - anyio.current_time()
            with anyio.move_on_after(left_s):
                await self._expiry.wait()
            is_over = self._expiry.is_set() or left_s <= 0
            if is_over and self._idle_since_s is not None:
                why = self._expired or f"nothing was heard of the session for {lease_s:g} s"
                raise SessionExpired(f"{why}; open another one")
            self._expiry = anyio.Event()

    async def _work(self) -> None:
        """Do what comes, in order."""
        while True:
            self._idle_since_s = anyio.current_time()
            received = await self._waiting.get()
            self._idle_since_s = None
            match received.message:
                case Step() as step:
                    async with self._resting:
                        await self._take(step, received)
                case Redirect() as redirect:
                    await self._redirect(redirect.successor)
                case Restore() as restore:
                    kept = (self._log, self._outlet.store) if self._feed else None
                    take_over_rows(self.engine, self.rows, restore, received.payload, kept)
                    await self._outlet.store.settle()
                case Restored() as restored:
                    await self._note_restored(restored)
                case CloseSession():
                    self.engine.close_session(self.rows)
                    await self.line.tell(Closed())
                    self.line.free()
                    return

    async def _take(self, step: Step, received: Received[Message]) -> None:
        """Compute a step, send its output on, and tell the client."""
        self.line.settle(step.settled)
        if step.number and step.number <= self.taken:
            return  # it came from a hop that was replaced meanwhile, or from the one that replaced it
        try:
            if self.taken and step.number > self.taken + 1:
                raise UsageError(f"step {step.number} came after step {self.taken}; one between them was refused")
            result = await self._compute(step, received)
        except Error as error:
            if self.rows.ended:
                raise
            await self.line.tell(Failure.of(error, step.number))
            return
        self.taken = max(self.taken, step.number)
        if self._handover is not None:
            self._handover.note(step)
        timing = Timing(result.queue_s, result.compute_s, result.found_tokens)
        if self._span is not None:
            fields = {"step": step.number, "tokens": sum(step.counts), "queue_s": result.queue_s}
            self._span.part("compute", result.queue_s + result.compute_s, fields)
        output_ND, *tapped = result.tensors
        told = tapped
        if self._feed is None:
            told = [output_ND, *tapped] if step.number else []
        else:
            await self._send_on(self._feed, step, output_ND, received.deadline_s)
        busy = self.engine.load
        load = Load(busy.free_tokens, busy.sessions)
        if told:
            metas, buffers = encode_tensors(told, self._opening.codec)
            await self.line.tell(Output(tensors=metas, timing=timing, number=step.number, load=load), buffers)
        else:
            await self.line.tell(Done(timing=timing, number=step.number, load=load))

    async def _compute(self, step: Step, received: Received[Message]) -> Result:
        (hidden_ND,) = decode_tensors(self.engine, (step.hidden,), received.payload, axes=2)
        taps = tuple(block for block in step.taps if block in self._opening.span)
        if not all_finite([hidden_ND]):
            count = count_not_finite([hidden_ND])
            raise NotFinite(f"{count} of {hidden_ND.numel()} numbers of step {step.number} are nan or infinite")
        try:
            async with asyncio.timeout(received.deadline_s):  # at half the cost of AnyIO's, on the way of every token
                result = await self.engine.step(
                    self.rows, hidden_ND, starts=step.starts, counts=step.counts, order=step.order, taps=taps
                )
        except TimeoutError as error:
            raise PeerTimeout(
                f"a step was not done within the {received.deadline_s or 0:g} s that were given; ask for less at once, "
                "or give it more time"
            ) from error
        check_finite([hidden_ND], result.tensors, self.engine, self.rows.adapter)
        return result

    async def _send_on(self, feed: FeedTo, step: Step, output_ND: torch.Tensor, deadline_s: float | None) -> None:
        """Write down what the successor gets, and send it."""
        encoded = encode(output_ND, self._opening.codec)
        sent = self._outlet.store.keep(encoded.meta, encoded.buffers)
        following = structs.replace(step, hidden=sent.meta)
        self._log.note(following, sent)
        await self._outlet.store.settle()
        if step.number or feed.successor.is_new:
            await self._push(feed, following, sent.payload, deadline_s)

    async def _push(self, feed: FeedTo, step: Step, payload: Buffer, deadline_s: float | None) -> bool:
        """Send a step to the successor, or else let the client pass it on; say whether it still is the successor."""
        if feed.send_now(step, payload, deadline_s):
            return True
        with anyio.CancelScope() as self._pushing:
            if await feed.send(step, payload, deadline_s):
                return True
        if self._pushing.cancel_called:  # there is a new one, who will get it
            return False
        await self.line.tell(step, [payload])
        return True

    async def _redirect(self, successor: Successor) -> None:
        """Give a new successor all that the last one was sent, or what it may lack if it holds the rest already."""
        if self._feed is None:
            raise UsageError("a session whose outputs go to the client was told of a successor")
        await self._feed.turn_to(successor)
        await self.line.tell(Redirected())
        began_s = time.perf_counter()
        steps = self._log.replay(replay_tokens(self._log)) if successor.is_new else self._log.recent()
        for step, payload in steps:
            if not await self._push(self._feed, step, payload, None):
                return
        event(
            _LOG,
            "replayed",
            to=successor.peer[:8],
            tokens=self._log.tokens if successor.is_new else 0,
            elapsed_s=round(time.perf_counter() - began_s, 3),
        )

    async def _hand_over(self, heir: Successor) -> None:
        """Give another server what this one holds."""
        if self._handover is None or self._handover.feed.successor != heir:
            if self._handover is not None:
                await self._handover.feed.hang_up()
            log = self._log if self._feed else None
            self._handover = Handover(FeedTo(self._outlet, heir), self.engine, self.rows, log)
        problem = ""
        began_s = time.perf_counter()
        try:
            await self._handover.give(self._resting, lambda: self.taken)
        except Error as error:
            problem = error.message[:512]
        elapsed_s = round(time.perf_counter() - began_s, 3)
        event(_LOG, "handed over", to=heir.peer[:8], step=self.taken, elapsed_s=elapsed_s, problem=problem)
        self._is_handing_over = False
        await self.line.tell(HandedOver(problem=problem))

    async def _note_restored(self, restored: Restored) -> None:
        """Go on from where the leaving server was."""
        self.engine.shorten(self.rows, restored.lengths)
        if self._feed is not None:
            self._log.shorten(restored.lengths)
        self.taken = restored.number
        await self.line.tell(Done(timing=Timing(0.0, 0.0), number=restored.number))

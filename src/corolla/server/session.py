"""A session on a server: where its steps come from, and where what becomes of them goes.

Steps come from the client, or from the hop before on a stream of its own; they are taken one after another. Outputs go
to the hop behind, and what was sent there is kept, so that another can be given it; the client hears of every step.
"""

# N packed tokens

import asyncio
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Final

import anyio
import torch
from msgspec import structs

from corolla.codec import decode, encode
from corolla.engine import Engine, Result, SessionRows
from corolla.errors import Error, PeerTimeout, PeerUnreachable, SessionExpired, UsageError
from corolla.replay import Log, Store, replay_tokens
from corolla.swarm import Channel, Endpoint, Received
from corolla.telemetry import event, logger
from corolla.wire import (
    Ack,
    Buffer,
    Closed,
    CloseSession,
    Done,
    Expect,
    Failure,
    Feed,
    Message,
    OpenSession,
    Output,
    Redirect,
    Redirected,
    SessionState,
    Step,
    Successor,
    TensorMeta,
    Timing,
    split_payload,
)

__all__ = ["Outlet", "ServedSession", "decode_tensors", "encode_tensors"]

_LOG = logger(__name__)
_WAITING_STEPS: Final = 8
"""Steps that wait for their turn; more wait in the network."""


@dataclass(frozen=True, slots=True)
class Outlet:
    """What a server's sessions send with.

    Args:
        endpoint: How other servers are reached.
        store: Keeps what is sent to them.
        dial_s: Limit for reaching a successor.
        step_s: Limit for sending a step or an answer.
    """

    endpoint: Endpoint
    store: Store
    dial_s: float = 10.0
    step_s: float = 120.0


class ServedSession:
    """One session, from when it is opened until it is closed, its client is lost, or its lease ends.

    Args:
        channel: The client's stream.
        opening: What the client asked for.
        engine: What computes.
        rows: What the session holds there.
        outlet: What it sends with.

    Attributes:
        token: What whoever feeds it must know.
    """

    def __init__(
        self, channel: Channel, opening: OpenSession, engine: Engine, rows: SessionRows, outlet: Outlet
    ) -> None:
        self.token = opening.token
        self._channel = channel
        self._opening = opening
        self._engine = engine
        self._rows = rows
        self._outlet = outlet
        self._taken = 0
        self._sending = anyio.Lock()
        self._waiting: asyncio.Queue[Received[Message]] = asyncio.Queue(_WAITING_STEPS)
        self._feeding = anyio.CancelScope()
        self._pushing = anyio.CancelScope()
        self._feed = _FeedTo(outlet, opening.successor) if opening.successor else None
        self._log = Log(opening.rows)

    async def run(self, state: SessionState, lease_s: float) -> None:
        """Take steps until the session is over.

        Raises:
            Error: What ended it, other than the client's wish.
        """
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._listen, state)
                await self._work(state, lease_s)
        finally:
            self._feeding.cancel()
            if self._feed:
                await self._feed.hang_up()

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

    async def _listen(self, state: SessionState) -> None:
        """Hear the client, also while a step is computed."""
        while True:
            received = await self._channel.receive()
            state.received(received.message)
            match received.message:
                case Expect() as expect:
                    self.token = expect.token
                    self._feeding.cancel()
                    await self._tell(state, Ack())
                    continue
                case Redirect():
                    self._pushing.cancel()
            await self._waiting.put(received)
            if isinstance(received.message, CloseSession):
                return

    async def _work(self, state: SessionState, lease_s: float) -> None:
        """Do what comes, in order."""
        while True:
            with anyio.move_on_after(lease_s) as lease:
                received = await self._waiting.get()
            if lease.cancelled_caught:
                raise SessionExpired(f"nothing was heard of the session for {lease_s:g} s; open another one")
            match received.message:
                case Step() as step:
                    await self._take(state, step, received)
                case Redirect() as redirect:
                    await self._redirect(state, redirect.successor)
                case CloseSession():
                    self._engine.close_session(self._rows)
                    await self._tell(state, Closed())
                    self._channel.settle()
                    return

    async def _take(self, state: SessionState, step: Step, received: Received[Message]) -> None:
        """Compute a step, send its output on, and tell the client."""
        if step.number and step.number <= self._taken:
            return  # it came from a hop that was replaced meanwhile, or from the one that replaced it
        try:
            if self._taken and step.number > self._taken + 1:
                raise UsageError(f"step {step.number} came after step {self._taken}; one between them was refused")
            result = await self._compute(step, received)
        except Error as error:
            if self._rows.ended:
                raise
            await self._tell(state, Failure.of(error, step.number))
            return
        self._taken = max(self._taken, step.number)
        timing = Timing(result.queue_s, result.compute_s)
        output_ND, *tapped = result.tensors
        told = tapped
        if self._feed is None:
            told = [output_ND, *tapped] if step.number else []
        else:
            await self._send_on(state, self._feed, step, output_ND, received.deadline_s)
        if told:
            metas, buffers = encode_tensors(told, self._opening.codec)
            await self._tell(state, Output(tensors=metas, timing=timing, number=step.number), buffers)
        else:
            await self._tell(state, Done(timing=timing, number=step.number))

    async def _compute(self, step: Step, received: Received[Message]) -> Result:
        (hidden_ND,) = decode_tensors(self._engine, (step.hidden,), received.payload, axes=2)
        taps = tuple(block for block in step.taps if block in self._opening.span)
        try:
            with anyio.fail_after(received.deadline_s):
                return await self._engine.step(
                    self._rows, hidden_ND, starts=step.starts, counts=step.counts, order=step.order, taps=taps
                )
        except TimeoutError as error:
            raise PeerTimeout(
                f"a step was not done within the {received.deadline_s or 0:g} s that were given; ask for less at once, "
                "or give it more time"
            ) from error

    async def _send_on(
        self, state: SessionState, feed: "_FeedTo", step: Step, output_ND: torch.Tensor, deadline_s: float | None
    ) -> None:
        """Write down what the successor gets, and send it."""
        encoded = encode(output_ND, self._opening.codec)
        sent = self._outlet.store.keep(encoded.meta, encoded.buffers)
        following = structs.replace(step, hidden=sent.meta)
        self._log.note(following, sent)
        await self._outlet.store.settle()
        if step.number or feed.successor.is_new:
            await self._push(state, feed, following, sent.payload, deadline_s)

    async def _push(
        self, state: SessionState, feed: "_FeedTo", step: Step, payload: Buffer, deadline_s: float | None
    ) -> bool:
        """Send a step to the successor, or else let the client pass it on; say whether it still is the successor."""
        with anyio.CancelScope() as self._pushing:
            if await feed.send(step, payload, deadline_s):
                return True
        if self._pushing.cancel_called:  # there is a new one, who will get it
            return False
        await self._tell(state, step, [payload])
        return True

    async def _redirect(self, state: SessionState, successor: Successor) -> None:
        """Give a new successor all that the last one was sent."""
        if self._feed is None:
            raise UsageError("a session whose outputs go to the client was told of a successor")
        await self._feed.turn_to(successor)
        await self._tell(state, Redirected())
        began_s = time.perf_counter()
        for step, payload in self._log.replay(replay_tokens(self._log)):
            if not await self._push(state, self._feed, step, payload, None):
                return
        event(
            _LOG,
            "replayed",
            to=successor.peer[:8],
            tokens=self._log.tokens,
            elapsed_s=round(time.perf_counter() - began_s, 3),
        )

    async def _tell(self, state: SessionState, message: Message, payload: Sequence[Buffer] = ()) -> None:
        async with self._sending:
            state.sent(message)
            await self._channel.send(message, payload, deadline_s=self._outlet.step_s)


class _FeedTo:
    """The stream to a session's successor, dialled when there is something to send."""

    def __init__(self, outlet: Outlet, successor: Successor) -> None:
        self.successor = successor
        self._outlet = outlet
        self._channel: Channel | None = None
        self._life = AsyncExitStack()
        self._is_unreachable = not successor.addresses

    async def turn_to(self, successor: Successor) -> None:
        """Feed another one from now on."""
        await self.hang_up()
        self.successor = successor
        self._is_unreachable = not successor.addresses

    async def send(self, step: Step, payload: Buffer, deadline_s: float | None) -> bool:
        """Send a step; say whether that was possible. After it was not, it is not tried again."""
        if self._is_unreachable:
            return False
        try:
            channel = self._channel or await self._dial()
            await channel.send(step, [payload], deadline_s=deadline_s or self._outlet.step_s)
        except Error as error:
            event(_LOG, "successor cannot be reached", peer=self.successor.peer[:8], code=error.code)
            self._is_unreachable = True
            await self.hang_up()
            return False
        return True

    async def hang_up(self) -> None:
        """Close the stream."""
        channel, self._channel = self._channel, None
        life, self._life = self._life, AsyncExitStack()
        with anyio.CancelScope(shield=True):
            if channel is not None:
                await channel.aclose()
            await life.aclose()

    async def _dial(self) -> Channel:
        successor, dial_s = self.successor, self._outlet.dial_s
        try:
            with anyio.fail_after(dial_s):
                dialling = self._outlet.endpoint.channel(successor.peer, successor.addresses)
                self._channel = await self._life.enter_async_context(dialling)
        except TimeoutError as error:
            raise PeerUnreachable(f"peer {successor.peer[:8]} was not reached within {dial_s:g} s") from error
        await self._channel.request(Feed(token=successor.token), expected=Ack, deadline_s=dial_s)
        return self._channel


def decode_tensors(
    engine: Engine, metas: Sequence[TensorMeta], payload: memoryview, *, axes: int
) -> list[torch.Tensor]:
    """Read the tensors of a request.

    Args:
        engine: For which the tensors must fit.
        metas: How to read them.
        payload: Their bytes.
        axes: How many axes each must have.

    Raises:
        UsageError: If a shape does not fit.
        CodecError: If the bytes and their descriptions do not fit together.
        RemoteProtocolError: Likewise.
    """
    span = engine.span
    for meta in metas:
        if len(meta.shape) != axes or meta.shape[-1] != span.hidden_size:
            raise UsageError(
                f"a tensor of shape {list(meta.shape)} was sent to blocks that take {axes} axes, the last of "
                f"{span.hidden_size} values"
            )
    parts = split_payload(payload, [meta.nbytes for meta in metas])
    tensors = [decode(meta, part) for meta, part in zip(metas, parts, strict=True)]
    return [tensor.to(span.dtype) for tensor in tensors]


def encode_tensors(tensors: Sequence[torch.Tensor], codec: str) -> tuple[tuple[TensorMeta, ...], list[Buffer]]:
    """Make the tensors of an answer: their descriptions, and their bytes."""
    encoded = [encode(tensor, codec) for tensor in tensors]
    return tuple(one.meta for one in encoded), [buffer for one in encoded for buffer in one.buffers]

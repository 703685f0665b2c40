"""What is said to one server, and what may be believed of its answers. Knows nothing of the other hops of a chain."""

# N packed tokens, D model width

import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, suppress
from typing import Self

import anyio
import torch

from corolla.codec import all_finite, count_not_finite, decode
from corolla.errors import (
    CodecError,
    Error,
    PeerLost,
    PeerMisbehaved,
    PeerTimeout,
    PeerUnreachable,
    RemoteProtocolError,
)
from corolla.swarm import Channel, Received
from corolla.telemetry import event, logger
from corolla.terms import Hop, PeerId
from corolla.wire import (
    Ack,
    Buffer,
    CloseSession,
    Expect,
    Gradients,
    HandedOver,
    HandOver,
    Message,
    OpenSession,
    Output,
    Redirect,
    Redirected,
    Resume,
    SessionOpened,
    SessionState,
    Step,
    Successor,
    split_payload,
)

__all__ = ["HopSession", "read_tensors"]

_LOG = logger(__name__)
_CLOSE_S = 2.0


class HopSession:
    """A session's end at one hop; made by :meth:`open`.

    Args:
        hop: Which hop.
        channel: A channel to its peer, for this session alone.
        opening: What was asked of it.

    Attributes:
        token: What the hop before knows to feed it.
        is_restored: Whether it has taken a step, and so has stored all that came before.
        done: The last step that it says it has taken.
        failure: What has ended the conversation.
    """

    def __init__(self, hop: Hop, channel: Channel, opening: OpenSession) -> None:
        self.hop = hop
        self.token = opening.token
        self._key = opening.key
        self.is_restored = False
        self.done = 0
        self.failure: Error | None = None
        self._channel = channel
        self._state = SessionState("client")
        self._life = AsyncExitStack()
        self._acknowledged = anyio.Event()
        self._handed_over = anyio.Event()
        self._problem = ""
        self._listening = anyio.CancelScope()
        self._ended = anyio.Event()
        self._redirects = 0

    @classmethod
    async def open(
        cls, hop: Hop, dialling: AbstractAsyncContextManager[Channel], opening: OpenSession, *, limit_s: float
    ) -> Self:
        """Reach a server and ask it for room; :meth:`listen` must run from then on.

        Args:
            hop: Which one.
            dialling: How to reach it.
            opening: What to ask for.
            limit_s: Limit for its answer.

        Raises:
            Error: What the server said, or how it failed.
        """
        async with AsyncExitStack() as life:
            channel = await life.enter_async_context(dialling)
            session = cls(hop, channel, opening)
            session._state.sent(opening)
            received = await channel.request(opening, expected=SessionOpened, deadline_s=limit_s)
            session._state.received(received.message)
            session._life = life.pop_all()
            return session

    @property
    def is_alive(self) -> bool:
        """Whether the session stands and, as far as can be told without asking, the server as well."""
        return self._state.state == "open" and self.failure is None

    @property
    def may_resume(self) -> bool:
        """Whether the server may still hold the session though the stream has broken."""
        return self.is_restored and self._key is not None and isinstance(self.failure, PeerLost)

    async def resume(self, dialling: AbstractAsyncContextManager[Channel], *, limit_s: float) -> int:
        """Go on over another stream; :meth:`listen` must run again from then on.

        Args:
            dialling: How to reach the server.
            limit_s: Limit for all of this.

        Returns:
            The last step that the server has taken.

        Raises:
            Error: What the server said, or how it failed.
        """
        self._listening.cancel()
        await self._ended.wait()
        async with AsyncExitStack() as life:
            with anyio.move_on_after(limit_s) as limit:
                channel = await life.enter_async_context(dialling)
            if limit.cancelled_caught:
                raise PeerUnreachable(f"peer {self.hop.peer[:8]} was not reached within {limit_s:g} s")
            state = SessionState("client")
            resume = Resume(key=self._key or b"", done=self.done)
            state.sent(resume)
            received = await channel.request(resume, expected=SessionOpened, deadline_s=limit_s)
            state.received(received.message)
            state.rows = self._state.rows
            await self._channel.aclose()
            await self._life.aclose()
            self._channel, self._state, self._life = channel, state, life.pop_all()
        self.failure = None
        self._redirects = 0
        self._listening = anyio.CancelScope()
        self._ended = anyio.Event()
        return received.message.taken

    async def listen(self, hear: "Callable[[HopSession, Received[Message] | Error], Awaitable[None]]") -> None:
        """Hear the server until the session is over.

        Args:
            hear: What to do with its answers, and with what ended the conversation if that was not :meth:`close`.
        """
        try:
            with self._listening:
                await self._listen(hear)
        finally:
            self._ended.set()

    async def _listen(self, hear: "Callable[[HopSession, Received[Message] | Error], Awaitable[None]]") -> None:
        try:
            while self._state.state != "idle":
                received = await self._channel.receive()
                self._state.received(received.message)
                match received.message:
                    case Ack():
                        self._acknowledged.set()
                    case HandedOver() as answer:
                        self._problem = answer.problem
                        self._handed_over.set()
                    case Redirected():
                        self._redirects -= 1
                    case Step() if self._redirects:
                        pass  # it was for another successor
                    case _ if self._state.state == "open":
                        await hear(self, received)
            self._channel.settle()
        except Error as error:
            error.peer = error.peer or self.hop.peer
            self.failure = error
            self._acknowledged.set()
            self._handed_over.set()
            await hear(self, error)

    async def send(self, step: Step, payload: Buffer, limit_s: float) -> None:
        """Send a step; its answer comes by way of :meth:`listen`.

        Raises:
            Error: If it could not be sent.
        """
        await self._say(step, limit_s, (payload,))

    async def expect(self, token: bytes, limit_s: float) -> None:
        """Let another hop feed the session, and no longer the one before it; returns once the server knows.

        Raises:
            Error: If it could not be told, or does not answer in time.
        """
        self._acknowledged = anyio.Event()
        await self._say(Expect(token=token), limit_s)
        await self._wait_for(self._acknowledged, limit_s)
        self.token = token

    async def hand_over(self, heir: Successor, limit_s: float) -> None:
        """Let the server give another what it holds, or what has changed since; returns once it has sent that.

        Raises:
            PeerUnreachable: If it cannot.
            Error: If it could not be told, or does not answer in time.
        """
        self._handed_over = anyio.Event()
        await self._say(HandOver(heir=heir), limit_s)
        await self._wait_for(self._handed_over, limit_s)
        if self._problem:
            raise PeerUnreachable(f"peer {self.hop.peer[:8]} could not hand over: {self._problem}", peer=heir.peer)

    async def redirect(self, successor: Successor, limit_s: float) -> None:
        """Let the hop give another one all that it has sent to the one behind it.

        Raises:
            Error: If it could not be told.
        """
        self._redirects += 1
        await self._say(Redirect(successor=successor), limit_s)

    async def close(self) -> None:
        """End the session in peace, so that the channel can be used again; or else end the channel."""
        life, self._life = self._life, AsyncExitStack()
        async with life:
            if self.is_alive:
                with suppress(Error), anyio.move_on_after(_CLOSE_S):
                    await self._say(CloseSession(), _CLOSE_S)
                    await self._ended.wait()
            if self._state.state != "idle":
                event(_LOG, "session not closed in peace", level=logging.DEBUG, peer=self.hop.peer[:8])
                self._listening.cancel()
                await self._channel.aclose()
            with anyio.move_on_after(_CLOSE_S):
                await self._ended.wait()

    async def _wait_for(self, answered: anyio.Event, limit_s: float) -> None:
        with anyio.move_on_after(limit_s) as limit:
            await answered.wait()
        if limit.cancelled_caught:
            raise PeerTimeout(f"peer {self.hop.peer[:8]} did not answer within {limit_s:g} s", peer=self.hop.peer)
        if self.failure is not None:
            raise self.failure

    async def _say(self, message: Message, limit_s: float, payload: Sequence[Buffer] = ()) -> None:
        self._state.sent(message)
        try:
            await self._channel.send(message, payload, deadline_s=limit_s)
        except Error as error:
            error.peer = error.peer or self.hop.peer
            self.failure = self.failure or error
            raise


def read_tensors(
    received: Received[Message], *, shapes: Sequence[Sequence[int]], peer: PeerId, is_finite: bool
) -> list[torch.Tensor]:
    """Decode the tensors of an answer.

    Args:
        received: The answer.
        shapes: The shapes that they must have.
        peer: Who answered.
        is_finite: Whether there was neither nan nor infinity in what it was asked, so that none may be in its answer.

    Raises:
        PeerMisbehaved: If they are not what was asked for, or cannot be read.
    """
    metas = received.message.tensors if isinstance(received.message, Output | Gradients) else ()
    if [tuple(meta.shape) for meta in metas] != [tuple(shape) for shape in shapes]:
        found, due = (
            ", ".join(str(list(shape)) for shape in some[:8]) for some in ([meta.shape for meta in metas], shapes)
        )
        raise PeerMisbehaved(
            f"peer {peer[:8]} answered with {len(metas)} tensors ({found}) where {len(shapes)} were due ({due})",
            peer=peer,
        )
    try:
        parts = split_payload(received.payload, [meta.nbytes for meta in metas])
        tensors = [decode(meta, part) for meta, part in zip(metas, parts, strict=True)]
    except (CodecError, RemoteProtocolError) as error:
        raise PeerMisbehaved(f"peer {peer[:8]} sent tensors that cannot be read: {error.message}", peer=peer) from error
    if is_finite and not all_finite(tensors):
        count = count_not_finite(tensors)
        raise PeerMisbehaved(
            f"peer {peer[:8]} answered with {count} numbers that are nan or infinite, and no error, to an input that "
            "has none",
            peer=peer,
        )
    return tensors

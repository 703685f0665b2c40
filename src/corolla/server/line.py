"""The line between a session and its client: a stream, and when that breaks, perhaps another.

Keeps the answers that the client may have missed. Knows nothing of what is computed.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Final, NamedTuple

import anyio

from corolla.errors import Error, PeerLost, SessionExpired
from corolla.swarm import Channel, Received
from corolla.wire import Buffer, Message, OpenSession, Resume, SessionOpened, SessionState, Step
from corolla.wire.limits import MAX_PAYLOAD_BYTES

__all__ = ["Line"]

_KEPT_ANSWERS: Final = 64
_KEPT_BYTES: Final = 2 * MAX_PAYLOAD_BYTES
"""Of answers that the client has not said it has; who leaves more than this open cannot come back."""


class _Answer(NamedTuple):
    number: int
    message: Message
    payload: Sequence[Buffer]
    nbytes: int


class Line:
    """Hears a client and tells it things. One task hears; any may tell.

    Args:
        channel: The client's stream.
        opening: What it has asked for.
        step_s: Limit for telling something.
        resume_s: How long to wait for the client when a stream has broken.

    Attributes:
        peer: Who the client is.
        key: What it must know to come back; ``None`` if it will not.
        is_parked: Whether its stream has broken, and it may come back.
    """

    def __init__(self, channel: Channel, opening: OpenSession, *, step_s: float, resume_s: float) -> None:
        self.peer: Final = channel.peer
        self.key: Final = opening.key
        self.is_parked = False
        self._channel = channel
        self._state = SessionState("server")
        self._state.received(opening)
        self._rows = opening.rows
        self._step_s = step_s
        self._resume_s = resume_s
        self._sending = asyncio.Lock()
        self._answers: deque[_Answer] = deque()
        self._forgotten = 0
        self._back = anyio.Event()
        self._left = anyio.Event()
        self._is_given_up = False
        self._error: Error | None = None

    async def receive(self) -> Received[Message]:
        """Wait for what the client says next, on whichever stream.

        Raises:
            PeerLost: If it has ended its stream; or that has broken, and it did not come back in time.
            Error: If it breaks the protocol.
        """
        while True:
            channel, state = self._channel, self._state
            try:
                received = await anext(channel, None)
            except PeerLost as error:
                await self._wait_for_client(channel, error)
                continue
            if received is None:
                raise PeerLost(f"peer {self.peer[:8]} has left without closing its session", peer=self.peer)
            state.received(received.message)
            return received

    async def tell(self, message: Message, payload: Sequence[Buffer] = ()) -> None:
        """Tell the client something; an answer that it misses is told again when it comes back.

        Raises:
            PeerLost: If its stream has broken for good.
            PeerTimeout: If it does not take it in time.
        """
        async with self._sending:
            self._state.sent(message)
            number = getattr(message, "number", 0)
            if self.key is not None and number:
                self._keep(_Answer(number, message, payload, sum(memoryview(part).nbytes for part in payload)))
            try:
                await self._channel.send(message, payload, deadline_s=self._step_s)
            except PeerLost:
                if self.key is None or (isinstance(message, Step) and not number):  # of a replay, which is not kept
                    raise

    def settle(self, number: int) -> None:
        """Forget the answers up to this step: the client has them."""
        while self._answers and self._answers[0].number <= number:
            self._answers.popleft()

    async def resume(self, channel: Channel, resume: Resume, opened: SessionOpened) -> None:
        """Go on with the client on another stream; returns when that is used no longer for the session.

        Args:
            channel: The stream.
            resume: What came on it.
            opened: What to answer.

        Raises:
            SessionExpired: If answers that the client lacks are not here any more.
            Error: What has ended the session.
        """
        async with self._sending:
            if resume.done < self._forgotten:
                raise SessionExpired(f"the answer of step {resume.done + 1} is not kept any more; open another session")
            state = SessionState("server")
            state.received(resume)
            state.rows = self._rows
            state.sent(opened)
            old, self._channel, self._state = self._channel, channel, state
            await channel.send(opened, deadline_s=self._step_s)
            for answer in [one for one in self._answers if one.number > resume.done]:
                state.sent(answer.message)
                await channel.send(answer.message, answer.payload, deadline_s=self._step_s)
        await old.aclose()
        self._left.set()
        left = self._left = anyio.Event()
        self._back.set()
        self._back = anyio.Event()
        await left.wait()
        if self._error is not None and self._channel is channel:
            raise self._error

    def give_up(self) -> None:
        """Wait for the client no longer."""
        self._is_given_up = True
        self._back.set()

    async def drop(self) -> None:
        """Close the stream without a word, and forget the client, as a crash does."""
        self.give_up()
        await self._channel.aclose()

    def free(self) -> None:
        """Note that the session was closed in peace: the stream can carry another."""
        self._channel.settle()

    def end(self, error: Error | None) -> None:
        """Note that the session is over, and what has ended it, if that was not the client's wish."""
        self._error = error
        self._left.set()

    async def _wait_for_client(self, channel: Channel, error: PeerLost) -> None:
        if self.key is None:
            raise error
        if channel is not self._channel:  # it has come back already
            return
        self.is_parked = True
        with anyio.move_on_after(self._resume_s) as limit:
            await self._back.wait()
        self.is_parked = False
        if limit.cancelled_caught or self._is_given_up:
            raise error

    def _keep(self, answer: _Answer) -> None:
        self._answers.append(answer)
        while len(self._answers) > _KEPT_ANSWERS or sum(one.nbytes for one in self._answers) > _KEPT_BYTES:
            self._forgotten = self._answers.popleft().number

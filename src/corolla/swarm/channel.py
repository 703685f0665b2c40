"""Typed messages over a stream. Knows frames and messages, and nothing of what they ask for."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Final, Generic, Literal, NamedTuple, Self, TypeVar

import anyio

from corolla.errors import (
    Error,
    FrameTooLarge,
    InternalError,
    PeerBusy,
    PeerLost,
    PeerOutdated,
    PeerTimeout,
    RemoteProtocolError,
)
from corolla.swarm.transports.transport import Ends, Path, Stream
from corolla.wire import (
    Buffer,
    Failure,
    Frame,
    FrameDecoder,
    Message,
    decode_message,
    encode_frame,
    encode_message,
    expect,
)
from corolla.wire.limits import MAX_MESSAGE_BYTES, MAX_PAYLOAD_BYTES

if TYPE_CHECKING:
    from corolla.swarm.members.invite import Grant
    from corolla.terms import PeerId

__all__ = ["Channel", "Received"]

_Expected = TypeVar("_Expected", bound=Message)
_Said = TypeVar("_Said", bound=Message, covariant=True)
_Way = Literal["send", "receive"]

_JOINED_BYTES: Final = 1 << 15
"""Frames up to this size are joined and sent at once: copying 32 KB costs less than another record and system call."""

_RECEIVE_BYTES: Final = 1 << 18
_NOTABLE_BYTES: Final = 1 << 20
_REFUSAL_S: Final = 1.0


class Received(NamedTuple, Generic[_Said]):
    """A message as it came.

    Args:
        message: The message.
        payload: Its raw part, which belongs to the receiver: it may be kept and written to.
        deadline_s: How many seconds the sender still gave when it sent it, or ``None`` for no limit.
    """

    message: _Said
    payload: memoryview
    deadline_s: float | None


class Channel:
    """Sends and receives messages over one stream, which it owns. One task may send while another receives.

    A send or receive that is cancelled or fails breaks the channel, since nobody can tell how much of the frame has
    passed: from then on it refuses that use, and is good for nothing but :meth:`aclose`.

    Args:
        stream: The stream.

    Attributes:
        peer: Who is on the other side.
        grant: What it may do in a private swarm; ``None`` in a public one, and before it has proved to be a member.
    """

    def __init__(self, stream: Stream) -> None:
        self.peer: Final[PeerId] = stream.peer
        self.grant: Grant | None = None
        self._stream = stream
        self._decoder = FrameDecoder()
        self._frames: Iterator[Frame] = iter(())
        self._sent = 0
        self._received = 0
        self._busy: set[_Way] = set()
        self._broken: set[_Way] = set()
        self._account: Callable[[int], None] = _free
        self._is_holding = False

    def __repr__(self) -> str:
        return f"Channel({self.peer[:8]}, {self._sent} sent, {self._received} received)"

    def expect_at_most(self, max_bytes: int) -> None:
        """Refuse larger frames from a stranger, until :meth:`admit`.

        Args:
            max_bytes: The largest message and payload together.
        """
        self._decoder.max_bytes = max_bytes

    def account(self, hold: Callable[[int], None]) -> None:
        """Say how much of an unfinished frame has come, whenever that is much.

        Args:
            hold: Called with the number of bytes; raises what is to end the stream if that is too much.
        """
        self._account = hold

    def admit(self, grant: "Grant") -> None:
        """Take the other side for a member of the private swarm, whose frames may be as large as any.

        Args:
            grant: What it may do.
        """
        self.grant = grant
        self._decoder.max_bytes = MAX_MESSAGE_BYTES + MAX_PAYLOAD_BYTES

    @property
    def is_reusable(self) -> bool:
        """Whether another conversation can begin: all messages were answered, none is under way, nothing has failed."""
        is_even = self._sent == self._received and self._decoder.is_between_frames
        return is_even and not self._busy and not self._broken and self._stream.is_quiet

    @property
    def path(self) -> Path:
        """How the bytes travel."""
        return self._stream.path

    @property
    def ends(self) -> Ends | None:
        """Between which ends the bytes travel, if straight over an IP network."""
        return self._stream.ends

    def release(self) -> tuple[Stream, bytes]:
        """Give up the stream, on which no messages follow: for raw bytes.

        Returns:
            The stream, which :meth:`aclose` still closes, and the raw bytes that have come already.

        Raises:
            InternalError: If it is in use, or broken.
        """
        if self._busy or self._broken:
            raise InternalError(f"the channel to peer {self.peer[:8]} cannot be released: it is in use, or broken")
        self._broken |= {"send", "receive"}
        self._frames = iter(())
        return self._stream, self._decoder.take_rest()

    def settle(self) -> None:
        """Note that a conversation has ended by its own rules, however many messages each side has sent in it."""
        self._received = self._sent

    async def send(self, message: Message, payload: Sequence[Buffer] = (), *, deadline_s: float | None = None) -> None:
        """Send a message.

        Args:
            message: The message.
            payload: The parts of its payload, which must not change before this returns.
            deadline_s: How long the other side has for it, and sending at most takes, in seconds; ``None`` for ever.

        Raises:
            FrameTooLarge: If a part is over its limit; nothing was sent.
            PeerTimeout: If it could not be sent in time.
            PeerLost: If the stream broke.
        """
        if self.send_now(message, payload, deadline_s=deadline_s):
            return
        buffers = encode_frame(encode_message(message), payload, deadline_s=deadline_s)
        with self._use("send"):
            try:
                with anyio.move_on_after(deadline_s) as limit:
                    for buffer in buffers:
                        await self._stream.send(buffer)
            except (anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
                raise self._lost_sending(message, error) from error
            if limit.cancelled_caught:
                raise self._timeout(f"did not take {type(message).__name__}", deadline_s)
        self._sent += 1

    def send_now(self, message: Message, payload: Sequence[Buffer] = (), *, deadline_s: float | None = None) -> bool:
        """Send a message if it is small, and that can be done without waiting for anything; say whether it was.

        Args:
            message: The message.
            payload: The parts of its payload.
            deadline_s: How long the other side has for it; ``None`` for ever.

        Raises:
            FrameTooLarge: If a part is over its limit; nothing was sent.
            PeerLost: If the stream broke, or has been closed.
            InternalError: If another task is sending.
        """
        buffers = encode_frame(encode_message(message), payload, deadline_s=deadline_s)
        if sum(memoryview(buffer).nbytes for buffer in buffers) > _JOINED_BYTES:
            return False
        with self._use("send"):
            try:
                is_sent = self._stream.send_now(b"".join(buffers))
            except anyio.BrokenResourceError as error:
                raise self._lost_sending(message, error) from error
        self._sent += is_sent
        return is_sent

    async def receive(self, *, deadline_s: float | None = None) -> Received[Message]:
        """Wait for the next message.

        If what comes is no message, the other side is told so, and the channel is closed.

        Args:
            deadline_s: How long to wait, in seconds; ``None`` for ever.

        Raises:
            PeerTimeout: If none came in time.
            PeerLost: If the stream broke or ended.
            RemoteProtocolError: If the bytes are no frame or message.
            PeerOutdated: If the peer speaks another version of the protocol.
            FrameTooLarge: If the frame is over the limit.
        """
        received = await self._receive(deadline_s)
        if received is None:
            raise self._lost("where its answer was due", None)
        return received

    def __aiter__(self) -> Self:
        """Iterate over the messages until the peer ends the stream between two of them."""
        return self

    async def __anext__(self) -> Received[Message]:
        """Wait for the next message, like :meth:`receive`.

        Raises:
            StopAsyncIteration: At a clean end.
            Error: As :meth:`receive`.
        """
        received = await self._receive(None)
        if received is None:
            raise StopAsyncIteration
        return received

    async def request(
        self,
        message: Message,
        payload: Sequence[Buffer] = (),
        *,
        expected: type[_Expected],
        deadline_s: float | None = None,
    ) -> Received[_Expected]:
        """Send a message and wait for its answer.

        Args:
            message: The message.
            payload: The parts of its payload.
            expected: The type of the answer if all is well.
            deadline_s: How long all this may take, in seconds; ``None`` for no limit.

        Returns:
            The answer, whose message is of type ``expected``.

        Raises:
            Error: What the peer reported, if it answered with a failure, after which the channel is still good; or what
                :meth:`send` and :meth:`receive` raise; or a :class:`RemoteProtocolError` for an answer of another type.
        """
        begin_s = anyio.current_time()
        try:
            await self.send(message, payload, deadline_s=deadline_s)
        except PeerLost as error:  # perhaps it said why before it hung up
            raise await self._last_words() or error from None
        left_s = None if deadline_s is None else max(0.0, deadline_s - (anyio.current_time() - begin_s))
        try:
            received = await self.receive(deadline_s=left_s)
        except PeerTimeout as error:
            raise self._timeout(f"did not answer {type(message).__name__}", deadline_s) from error
        try:
            answer = expect(received.message, expected, peer=self.peer)
        except RemoteProtocolError:
            if not isinstance(received.message, Failure):
                await self.aclose()
            raise
        return Received(answer, received.payload, received.deadline_s)

    async def refuse(self, error: Error) -> None:
        """Tell the other side what is wrong, if it can still be told within a second, and close."""
        with anyio.move_on_after(_REFUSAL_S):
            try:
                if "send" not in self._busy | self._broken:
                    await self.send(Failure.of(error))
                    await self._stream.send_eof()
                    # Closing with bytes unread would make TCP discard what was just sent: read on for the moment.
                    while True:
                        await self._stream.receive(_RECEIVE_BYTES)
            except (PeerLost, anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
                pass
        await self.aclose()

    async def aclose(self) -> None:
        """Close the stream."""
        self._broken |= {"send", "receive"}
        await self._stream.aclose()

    async def _receive(self, deadline_s: float | None) -> Received[Message] | None:
        """Wait for the next message; ``None`` at a clean end."""
        try:
            with self._use("receive"):
                received = await self._read(deadline_s)
        except (RemoteProtocolError, PeerOutdated, FrameTooLarge, PeerBusy) as error:
            if isinstance(error, PeerOutdated):
                error.peer = self.peer
            await self.refuse(error)
            raise
        self._received += received is not None
        return received

    async def _read(self, deadline_s: float | None) -> Received[Message] | None:
        limit = nullcontext() if deadline_s is None else anyio.move_on_after(deadline_s)
        try:
            with limit:
                frame = await self._next_frame()
                return frame and Received(decode_message(frame.message), frame.payload, frame.deadline_s)
        except anyio.BrokenResourceError as error:
            raise self._lost("while something of it was awaited", error) from error
        except anyio.ClosedResourceError as error:
            raise self._lost("because this side closed the stream", error) from error
        raise self._timeout("sent nothing", deadline_s)

    async def _next_frame(self) -> Frame | None:
        while True:
            for frame in self._frames:
                self._note_held(0)
                return frame
            self._note_held(self._decoder.held_bytes)
            try:
                data = await self._stream.receive(_RECEIVE_BYTES)
            except anyio.EndOfStream as error:
                if self._decoder.is_between_frames:
                    return None
                raise anyio.BrokenResourceError from error
            self._frames = self._decoder.receive(data)

    def _note_held(self, nbytes: int) -> None:
        """Account for an unfinished frame, if it is, or was, notable."""
        if nbytes > _NOTABLE_BYTES or self._is_holding:
            self._is_holding = nbytes > _NOTABLE_BYTES
            self._account(nbytes if self._is_holding else 0)

    async def _last_words(self) -> Error | None:
        """After a failed send, give the failure that the peer had reported, if there is one."""
        try:
            received = await self._read(_REFUSAL_S)
        except Error:
            return None
        if received is None or not isinstance(received.message, Failure):
            return None
        return received.message.error(self.peer)

    def _use(self, way: "_Way") -> "_Use":
        """Reserve one way of the channel; if its use does not end well, it is broken."""
        if way in self._broken:
            raise PeerLost(f"the channel to peer {self.peer[:8]} is closed or broken; open another", peer=self.peer)
        if way in self._busy:
            raise InternalError(f"two tasks want to {way} on the channel to peer {self.peer[:8]} at once")
        return _Use(way, self._busy, self._broken)

    def _lost(self, when: str, error: Exception | None) -> PeerLost:
        cause = str(error.__cause__ or "") if error is not None else ""
        return PeerLost(f"peer {self.peer[:8]} was lost {when}" + (f": {cause}" if cause else ""), peer=self.peer)

    def _lost_sending(self, message: Message, error: Exception) -> PeerLost:
        return self._lost(f"while {type(message).__name__} was sent to it", error)

    def _timeout(self, what: str, deadline_s: float | None) -> PeerTimeout:
        return PeerTimeout(f"peer {self.peer[:8]} {what} within {deadline_s or 0:g} s", peer=self.peer)


class _Use:
    """One use of one way of a channel. A class, since a generator as context takes twice as long, twice a hop."""

    def __init__(self, way: _Way, busy: set[_Way], broken: set[_Way]) -> None:
        self._way: Final[_Way] = way
        self._busy = busy
        self._broken = broken

    def __enter__(self) -> None:
        self._busy.add(self._way)

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        self._busy.discard(self._way)
        if kind is not None:
            self._broken.add(self._way)


def _free(_: int) -> None:
    """Let the other side send as much as it likes."""

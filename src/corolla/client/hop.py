"""What is said to one server, and what may be believed of its answers. Knows nothing of the other hops of a chain."""

# N packed tokens, D model width

import logging
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Self, TypeVar

import torch

from corolla.codec import decode
from corolla.errors import CodecError, Error, PeerMisbehaved, RemoteProtocolError
from corolla.swarm import Channel, Received
from corolla.telemetry import event, logger
from corolla.terms import Hop, PeerId
from corolla.wire import (
    Buffer,
    Closed,
    CloseSession,
    Done,
    Failure,
    Gradients,
    Message,
    OpenSession,
    Output,
    SessionOpened,
    SessionState,
    Step,
    Timing,
    split_payload,
)

__all__ = ["HopSession", "read_tensors"]

_LOG = logger(__name__)
_CLOSE_S = 2.0
_Expected = TypeVar("_Expected", bound=Message)


class HopSession:
    """A session's end at one hop; made by :meth:`open`.

    Args:
        hop: Which hop.
        channel: A channel to its peer, for this session alone.
        step_s: Limit for one step.

    Attributes:
        is_restored: Whether the server has stored all that the hop's log tells; for whoever restores it to set.
    """

    def __init__(self, hop: Hop, channel: Channel, *, step_s: float) -> None:
        self.hop = hop
        self.is_restored = False
        self._channel = channel
        self._step_s = step_s
        self._state = SessionState()
        self._life = AsyncExitStack()

    @classmethod
    async def open(
        cls,
        hop: Hop,
        dialling: AbstractAsyncContextManager[Channel],
        opening: OpenSession,
        *,
        open_s: float,
        step_s: float,
    ) -> Self:
        """Reach a server and ask it for room.

        Args:
            hop: Which one.
            dialling: How to reach it.
            opening: What to ask for.
            open_s: Limit for its answer.
            step_s: Limit for one step, later.

        Raises:
            Error: What the server said, or how it failed.
        """
        async with AsyncExitStack() as life:
            session = cls(hop, await life.enter_async_context(dialling), step_s=step_s)
            await session._ask(opening, (), SessionOpened, open_s)
            session._life = life.pop_all()
            return session

    @property
    def is_open(self) -> bool:
        """Whether the session stands and a step may be sent."""
        return self._state.state == "open"

    @property
    def is_alive(self) -> bool:
        """Whether the session stands and, as far as can be told without asking, the server as well."""
        return self.is_open and self._channel.is_reusable

    async def step(self, step: Step, payload: Buffer) -> tuple[list[torch.Tensor], Timing]:
        """Run new tokens through this hop's blocks.

        Args:
            step: Which tokens; it tells how the payload is encoded.
            payload: Their hidden states.

        Returns:
            The last block's output and the taps', nothing if the step is quiet; and what the server says of its time.

        Raises:
            Error: What the server said, or how it failed. If :attr:`is_open` still holds, the server refused the step
                and has stored nothing of it.
        """
        if step.is_quiet:
            return [], (await self._ask(step, (payload,), Done, self._step_s)).message.timing
        received = await self._ask(step, (payload,), Output, self._step_s)
        tensors = read_tensors(received, shape=step.hidden.shape, count=1 + len(step.taps), peer=self.hop.peer)
        return tensors, received.message.timing

    async def close(self) -> None:
        """End the session in peace, so that the channel can be used again; or else end the channel."""
        life, self._life = self._life, AsyncExitStack()
        async with life:
            try:
                if self.is_open:
                    await self._ask(CloseSession(), (), Closed, _CLOSE_S)
            except Error as error:
                event(_LOG, "session not closed in peace", level=logging.DEBUG, peer=self.hop.peer[:8], code=error.code)
            if self._state.state != "idle":
                await self._channel.aclose()

    async def _ask(
        self, message: Message, payload: Sequence[Buffer], expected: type[_Expected], limit_s: float
    ) -> Received[_Expected]:
        self._state.sent(message)
        try:
            received = await self._channel.request(message, payload, expected=expected, deadline_s=limit_s)
        except Error as error:
            if self._channel.is_reusable:  # so the error is the server's answer, not the end of the conversation
                self._state.received(Failure.of(error))
            error.peer = error.peer or self.hop.peer
            raise
        self._state.received(received.message)
        return received


def read_tensors(
    received: Received[Output | Gradients], *, shape: Sequence[int], count: int, peer: PeerId
) -> list[torch.Tensor]:
    """Decode the tensors of an answer.

    Args:
        received: The answer.
        shape: The shape that each of them must have.
        count: How many there must be.
        peer: Who answered.

    Raises:
        PeerMisbehaved: If they are not what was asked for, or cannot be read.
    """
    metas = received.message.tensors
    if [list(meta.shape) for meta in metas] != [list(shape)] * count:
        found = ", ".join(str(list(meta.shape)) for meta in metas[:8])
        raise PeerMisbehaved(
            f"peer {peer[:8]} answered with {len(metas)} tensors ({found}) where {count} of {list(shape)} were due",
            peer=peer,
        )
    try:
        parts = split_payload(received.payload, [meta.nbytes for meta in metas])
        return [decode(meta, part) for meta, part in zip(metas, parts, strict=True)]
    except (CodecError, RemoteProtocolError) as error:
        raise PeerMisbehaved(f"peer {peer[:8]} sent tensors that cannot be read: {error.message}", peer=peer) from error

"""What is said to one server, and what may be believed of its answers. Knows nothing of the other hops of a chain."""

# N packed tokens, D model width

import logging
from collections.abc import Sequence
from typing import TypeVar

import torch

from corolla.codec import decode, encode
from corolla.errors import CodecError, Error, PeerMisbehaved, RemoteProtocolError
from corolla.swarm import Channel, Received
from corolla.telemetry import event, logger
from corolla.terms import Hop, PeerId
from corolla.wire import (
    Buffer,
    Closed,
    CloseSession,
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
    """A session's end at one hop.

    Args:
        hop: Which hop.
        channel: A channel to its peer, for this session alone.
        codec: How activations should travel.
        step_s: Limit for one step.
    """

    def __init__(self, hop: Hop, channel: Channel, *, codec: str, step_s: float) -> None:
        self.hop = hop
        self._channel = channel
        self._codec = codec
        self._step_s = step_s
        self._state = SessionState()

    @property
    def is_open(self) -> bool:
        """Whether the session stands and a step may be sent."""
        return self._state.state == "open"

    async def open(self, opening: OpenSession, limit_s: float) -> None:
        """Ask the server for room.

        Raises:
            Error: What the server said, or how it failed.
        """
        await self._ask(opening, (), SessionOpened, limit_s)

    async def step(
        self,
        hidden_ND: torch.Tensor,
        starts: tuple[int, ...],
        counts: tuple[int, ...],
        order: tuple[int, ...] | None,
        taps: tuple[int, ...],
    ) -> tuple[list[torch.Tensor], Timing]:
        """Run new tokens through this hop's blocks.

        Returns:
            The last block's output and the taps', and what the server says of its time.

        Raises:
            Error: What the server said, or how it failed. If :attr:`is_open` still holds, the server refused the step
                and has stored nothing of it.
        """
        encoded = encode(hidden_ND, self._codec)
        step = Step(starts=starts, counts=counts, order=order, taps=taps, hidden=encoded.meta)
        received = await self._ask(step, encoded.buffers, Output, self._step_s)
        tensors = read_tensors(received, shape=hidden_ND.shape, count=1 + len(taps), peer=self.hop.peer)
        return tensors, received.message.timing

    async def close(self) -> None:
        """End the session in peace, so that the channel can be used again; or else end the channel."""
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

"""What a server sends to other servers: with what, and on which stream."""

from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

import anyio

from corolla.errors import Error, PeerLost, PeerUnreachable
from corolla.replay import Store
from corolla.swarm import Channel, Endpoint
from corolla.telemetry import event, logger
from corolla.wire import Ack, Buffer, Feed, Message, Step, Successor

__all__ = ["FeedTo", "Outlet"]

_LOG = logger(__name__)


@dataclass(frozen=True, slots=True)
class Outlet:
    """What a server's sessions send with.

    Args:
        endpoint: How other servers are reached.
        store: Keeps what is sent to them.
        dial_s: Limit for reaching a successor.
        step_s: Limit for sending a step or an answer.
        resume_s: How long a session waits for its client to come back when its stream has broken.
    """

    endpoint: Endpoint
    store: Store
    dial_s: float = 10.0
    step_s: float = 120.0
    resume_s: float = 30.0


class FeedTo:
    """The stream to a session's successor, dialled when there is something to send.

    Args:
        outlet: What to send with.
        successor: Whom to feed.
    """

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

    async def give(self, message: Message, payload: Sequence[Buffer] = (), deadline_s: float | None = None) -> None:
        """Send a message.

        Raises:
            Error: If the successor cannot be reached, or does not take it in time.
        """
        channel = self._channel or await self._dial()
        await channel.send(message, payload, deadline_s=deadline_s or self._outlet.step_s)

    def send_now(self, step: Step, payload: Buffer, deadline_s: float | None) -> bool:
        """Send a step if that can be done without waiting for anything; say whether it was."""
        try:
            return self._channel is not None and self._channel.send_now(
                step, [payload], deadline_s=deadline_s or self._outlet.step_s
            )
        except PeerLost:
            return False  # :meth:`send` finds out as well

    async def send(self, step: Step, payload: Buffer, deadline_s: float | None) -> bool:
        """Send a step; say whether that was possible. After it was not, it is not tried again."""
        if self._is_unreachable:
            return False
        try:
            await self.give(step, [payload], deadline_s)
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

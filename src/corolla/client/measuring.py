"""How far away servers are, measured before anybody asks: those that routing would consider, and few at a time."""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import anyio

from corolla.errors import Error
from corolla.swarm import Endpoint, Pings
from corolla.telemetry import event, logger
from corolla.terms import Announcement, PeerId
from corolla.wire import Ping, Pong

__all__ = ["any_answers", "measure_often"]

_LOG = logger(__name__)
_AGAIN_S = 10.0
_AT_ONCE = 8
_BETWEEN_S = 0.2
_IDLE_S = 1.0
_ASKED = 8
"""Servers that are tried before none is said to answer."""
_REST = 50
"""Choosing rests for so many times as long as it took."""


async def measure_often(
    pings: Pings, choose: Callable[[], Sequence[Announcement]], blame: Callable[[PeerId, Error], None]
) -> None:
    """Measure the way to chosen servers again and again, new ones soon, until cancelled.

    The channels stay open for sessions. At most eight servers are pinged at once, and at most forty a second.

    Args:
        pings: Measures, and keeps what was measured.
        choose: Says whom to measure, the most promising first.
        blame: Hears who could not be measured.
    """
    due_s: dict[PeerId, float] = {}

    async def measure(server: Announcement) -> None:
        try:
            await pings.ping(server.peer, server.addresses)
        except Error as error:
            blame(server.peer, error)
            event(_LOG, "ping failed", level=logging.DEBUG, peer=server.peer[:8], code=error.code)

    chosen: dict[PeerId, Announcement] = {}
    look_s = 0.0
    while True:
        now_s = time.monotonic()
        if now_s >= look_s:
            chosen = {server.peer: server for server in choose()}
            look_s = now_s + _REST * (time.monotonic() - now_s)
        due_s = {peer: at_s for peer, at_s in due_s.items() if at_s > now_s}
        due = [server for peer, server in chosen.items() if peer not in due_s]
        async with anyio.create_task_group() as tasks:
            for server in due[:_AT_ONCE]:
                due_s[server.peer] = now_s + _AGAIN_S
                tasks.start_soon(measure, server)
        await anyio.sleep(_BETWEEN_S if due else _IDLE_S)


async def any_answers(endpoint: Endpoint, servers: Sequence[Announcement], within_s: float) -> bool:
    """Say whether any of some servers answers on a new stream; several are asked at once.

    Args:
        endpoint: How to reach them.
        servers: Whom to ask.
        within_s: For how long.
    """
    answered = anyio.Event()

    async def ask(server: Announcement) -> None:
        with suppress(Error):
            async with endpoint.channel(server.peer, server.addresses, is_new=True) as channel:
                await channel.request(Ping(), expected=Pong, deadline_s=within_s)
                answered.set()
                asking.cancel_scope.cancel()

    with anyio.move_on_after(within_s):
        async with anyio.create_task_group() as asking:
            for server in servers[:_ASKED]:
                asking.start_soon(ask, server)
    return answered.is_set()

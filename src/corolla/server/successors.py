"""How far it is from a server to those that are likely to follow it in a chain, and how fast it can send."""

import logging
from collections.abc import Callable

import anyio

from corolla.errors import Error
from corolla.routing import likely_successors
from corolla.swarm import Endpoint, Pings
from corolla.telemetry import event, logger
from corolla.terms import MAX_RTTS, RTT_PEER_LETTERS, Announcement, Rtt, Snapshot

__all__ = ["Successors"]

_LOG = logger(__name__)
_EVERY_S = 10.0
_UNSEEN_S = 0.5
"""How long to wait for an announcement of one's own."""
_NEW_AT_ONCE = 4
_NOTABLE = 0.25
"""The share by which a round trip must have changed for others to hear of it."""
_BANDWIDTH_EVERY = 60
"""Rounds between two measurements of bandwidth."""


class Successors:
    """Measures the way to servers that can go on where this one's span ends: the nearest again and again, others once.

    Args:
        endpoint: How to reach them.
        look: Gives the present view of the swarm.
    """

    def __init__(self, endpoint: Endpoint, look: Callable[[], Snapshot]) -> None:
        self._endpoint = endpoint
        self._look = look
        self._pings = Pings(endpoint)
        self._rtts_s: dict[str, float] = {}
        self._bytes_per_s: float | None = None

    @property
    def rtts(self) -> tuple[Rtt, ...]:
        """Round trips to the nearest of them, as they are announced; others only hear of changes that matter."""
        return tuple(Rtt(name, rtt_s) for name, rtt_s in sorted(self._rtts_s.items()))

    @property
    def bytes_per_s(self) -> float | None:
        """How fast a message of a mebibyte left this server; ``None`` before that was measured."""
        return self._bytes_per_s

    async def run(self) -> None:
        """Measure until cancelled."""
        rounds = 0
        while True:
            snapshot = self._look()
            own = next((one for one in snapshot.announcements if one.peer == self._endpoint.peer_id), None)
            if own is None or own.state == "joining":
                await anyio.sleep(_UNSEEN_S)
                continue
            await self._measure(likely_successors(snapshot, own))
            if rounds % _BANDWIDTH_EVERY == 0:
                await self._measure_bandwidth([one for one in snapshot.announcements if one.peer != own.peer])
            rounds += bool(self._bytes_per_s)
            await anyio.sleep(_EVERY_S)

    async def _measure(self, likely: list[Announcement]) -> None:
        """Ping the nearest of the likely ones that are known, and some that are not."""
        known = {one.peer: rtt_s for one in likely if (rtt_s := self._pings.rtt_s(one.peer)) is not None}
        nearest = sorted((one for one in likely if one.peer in known), key=lambda one: known[one.peer])
        chosen = [*nearest[:MAX_RTTS], *[one for one in likely if one.peer not in known][:_NEW_AT_ONCE]]
        reached: list[tuple[float, str]] = []

        async def measure(server: Announcement) -> None:
            try:
                await self._pings.ping(server.peer, server.addresses)
            except Error as error:
                event(_LOG, "ping failed", level=logging.DEBUG, peer=server.peer[:8], code=error.code)
            else:
                reached.append((self._pings.rtt_s(server.peer) or 0.0, server.peer[:RTT_PEER_LETTERS]))

        async with anyio.create_task_group() as tasks:
            for server in chosen:
                tasks.start_soon(measure, server)
        found = {name: _rounded(rtt_s) for rtt_s, name in sorted(reached)[:MAX_RTTS]}
        if found.keys() != self._rtts_s.keys() or any(_differs(self._rtts_s[name], found[name]) for name in found):
            self._rtts_s = found

    async def _measure_bandwidth(self, servers: list[Announcement]) -> None:
        """Send much to the first that takes it."""
        for server in servers[:_NEW_AT_ONCE]:
            try:
                self._bytes_per_s = _rounded(await self._pings.bandwidth(server.peer, server.addresses))
            except Error as error:
                event(_LOG, "bandwidth not measured", level=logging.DEBUG, peer=server.peer[:8], code=error.code)
            else:
                return


def _differs(old: float, new: float) -> bool:
    return abs(new - old) > _NOTABLE * old


def _rounded(value: float) -> float:
    """Keep two digits: what has hardly changed need not be told again."""
    return float(f"{value:.2g}")

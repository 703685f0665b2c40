"""Watches a swarm for as long as it lives: draws it when it changes, measures the ways, and remembers.

Owns the picture that everyone is shown, so that a thousand viewers cost what one does.
"""

import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Final

import anyio
import msgspec
from anyio import to_thread

from corolla.errors import Error
from corolla.monitor.changes import Change, compare
from corolla.monitor.config import MonitorConfig
from corolla.monitor.history import History
from corolla.monitor.look import watching
from corolla.monitor.picture import Picture, draw
from corolla.swarm import Pings, SwarmConfig, Watcher
from corolla.telemetry import event, logger
from corolla.terms import Announcement, PeerId

__all__ = ["Observer", "observing"]

_LOG = logger(__name__)
_LOOK_S: Final = 1.0  # the least time between two pictures
_OLDEST_S: Final = 5.0  # the most
_BLIND_S: Final = 10.0  # a view that is older says nothing of who has gone
_PINGS_AT_ONCE: Final = 16
_MAX_MEASURED: Final = 2048
_CHANGES_SHOWN: Final = 200


class Observer:
    """Keeps a picture of a swarm up to date.

    Args:
        watcher: What sees it.
        pings: What measures the ways to servers.
        history: What remembers.
        config: How often.
        wall_s: The clock on the wall, in seconds since 1970.

    Attributes:
        picture: The newest.
        encoded: The same as JSON.
        number: Rises with each picture.
        changes: What happened lately, the newest first.
        counts: How often each thing has happened since this began.
        changed: Is set at the next picture.
    """

    def __init__(
        self,
        watcher: Watcher,
        pings: Pings,
        history: History,
        config: MonitorConfig,
        *,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        self.config = config
        self.history = history
        self.picture = Picture(at_s=wall_s(), age_s=None)
        self.encoded = msgspec.json.encode(self.picture)
        self.number = 0
        self.changes: list[Change] = []
        self.counts: dict[str, int] = {}
        self.changed = anyio.Event()
        self._watcher = watcher
        self._pings = pings
        self._wall_s = wall_s
        self._known: dict[PeerId, Announcement] | None = None
        self._since_s: dict[PeerId, float] = {}
        self._answers: dict[PeerId, float | None] = {}
        self._is_blind = False
        self._has_measured = anyio.Event()

    async def run(self) -> None:
        """Watch until cancelled."""
        self.changes = await self.history.changes(_CHANGES_SHOWN)
        self._since_s = await self.history.since(self._wall_s())
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._draw_often)
            tasks.start_soon(self._measure_often)
            tasks.start_soon(self._sample_often)

    async def measured(self) -> None:
        """Wait until the way to every server has been measured once, and the picture shows it."""
        await self._has_measured.wait()
        await self.changed.wait()

    async def _draw_often(self) -> None:
        while True:
            changed = self._watcher.view.changed
            await self._look()
            await anyio.sleep(_LOOK_S)
            with anyio.move_on_after(_OLDEST_S - _LOOK_S):
                await changed.wait()

    async def _look(self) -> None:
        snapshot, now_s = self._watcher.snapshot(), self._wall_s()
        changes = self._find_changes({one.peer: one for one in snapshot.announcements}, snapshot.age_s, now_s)

        def make() -> tuple[Picture, bytes]:
            picture = draw(
                snapshot,
                now_s,
                answers=dict(self._answers),
                since_s=self._since_s,
                show_addresses=self.config.show_addresses,
            )
            return picture, msgspec.json.encode(picture)

        self.picture, self.encoded = await to_thread.run_sync(make)
        self.number += 1
        if changes:
            self.changes = [*reversed(changes), *self.changes][:_CHANGES_SHOWN]
            for change in changes:
                self.counts[change.what] = self.counts.get(change.what, 0) + 1
                event(_LOG, change.what, peer=change.peer[:8], name=change.name, span=change.span)
            await self.history.add(changes)
        self.changed.set()
        self.changed = anyio.Event()

    def _find_changes(self, seen: Mapping[PeerId, Announcement], age_s: float, now_s: float) -> list[Change]:
        """Compare with the last look; while the swarm cannot be seen, nobody is said to have gone."""
        is_blind = age_s > _BLIND_S
        if is_blind != self._is_blind:
            self._is_blind = is_blind
            return [Change(at_s=now_s, what="blind" if is_blind else "sighted")]
        if is_blind:
            return []
        before, self._known = self._known, dict(seen)
        self._since_s = {peer: self._since_s.get(peer, now_s) for peer in seen}
        self._answers = {peer: rtt_s for peer, rtt_s in self._answers.items() if peer in seen}
        return [] if before is None else compare(before, seen, now_s)

    async def _measure_often(self) -> None:
        room = anyio.Semaphore(_PINGS_AT_ONCE)

        async def measure(server: Announcement) -> None:
            async with room:
                try:
                    await self._pings.ping(server.peer, server.addresses)
                except Error:
                    self._answers[server.peer] = None
                else:
                    self._answers[server.peer] = self._pings.rtt_s(server.peer)

        while True:
            servers = self._watcher.snapshot().announcements
            async with anyio.create_task_group() as tasks:
                for server in servers[:_MAX_MEASURED]:
                    tasks.start_soon(measure, server)
            self._has_measured.set()
            await anyio.sleep(self.config.measure_s if servers else _LOOK_S)

    async def _sample_often(self) -> None:
        await self.measured()
        while True:
            if not self._is_blind:
                await self.history.note(self.picture, self._since_s)
            await anyio.sleep(self.config.sample_s)


@asynccontextmanager
async def observing(swarm: SwarmConfig, peers: Sequence[str], config: MonitorConfig) -> AsyncIterator[Observer]:
    """Watch a swarm for the length of a block.

    Args:
        swarm: How to talk to it; in a private swarm, with the invite.
        peers: Addresses of its peers; those of the invite are tried as well.
        config: What to remember, and how often to look.

    Raises:
        UsageError: If the invite is none, or an address cannot be read.
        ConfigError: If the database cannot be used.
        BootstrapFailed: If no peer answers.
        NotAMember: If the swarm turns this peer away.
    """
    history = History(config.database, keep_s=config.keep_s, max_changes=config.max_events)
    async with history, watching(swarm, peers) as (endpoint, watcher), anyio.create_task_group() as tasks:
        observer = Observer(watcher, Pings(endpoint), history, config)
        drawn = observer.changed
        tasks.start_soon(observer.run)
        await drawn.wait()  # nobody is to be shown a swarm without servers because it was not looked at yet
        yield observer
        tasks.cancel_scope.cancel()

"""A directory that is kept by a store which an operator runs already, instead of by gossip.

A store is believed no more than any peer: what it gives back is judged by ``directory/directory.py``, as what peers
send. Servers put their records into it and follow what others put there; clients only follow. Which store that is, is
known to ``directory/redis_store.py``. As servers have no links then, each looks after the few that come after it in the
order of their ids, so that death is noticed as soon as among neighbours.
"""

import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from itertools import chain, islice
from typing import Final, NamedTuple, Protocol

import anyio

from corolla.errors import BootstrapFailed, Error, PeerBusy, SwarmError, UsageError
from corolla.swarm.channel import Channel
from corolla.swarm.directory.directory import Directory
from corolla.swarm.directory.entry import Entry
from corolla.swarm.directory.presence import Presence
from corolla.swarm.directory.stamps import accuse
from corolla.swarm.directory.view import View
from corolla.swarm.directory.watcher import Watcher
from corolla.swarm.endpoint import Endpoint
from corolla.swarm.finding.contacts import Contacts
from corolla.swarm.pings import Pings
from corolla.telemetry import event, logger
from corolla.terms import PeerId
from corolla.wire import Message, News, Publish, Record, Suspicion

__all__ = ["Reading", "Store", "StoreWatcher", "StoredPresence"]

_LOG = logger(__name__)
_READ_AGAIN_S: Final = 300.0  # all of it, for whatever was missed
_TRIES: Final = 2  # pings that must fail one after the other


class Reading(NamedTuple):
    """What a store has given.

    Args:
        records: Announcements, with their age.
        suspicions: What peers say of others.
        mark: Where to go on reading.
    """

    records: Sequence[Record]
    suspicions: Sequence[Suspicion]
    mark: str


class Store(Protocol):
    """What keeps records for all. Each method raises :class:`~corolla.errors.SwarmError` if it cannot be reached."""

    async def read(self) -> Reading:
        """Read every record that is kept."""

    async def news(self, mark: str, wait_s: float) -> Reading:
        """Wait for what is new since a mark, for so long at most."""

    async def put(self, peer: PeerId, record: Record) -> None:
        """Keep a peer's record instead of its last one."""

    async def accuse(self, suspicion: Suspicion) -> None:
        """Tell others of a suspicion."""

    async def aclose(self) -> None:
        """Let go of the store."""


class StoredPresence(Presence):
    """Takes part in a swarm whose directory a store keeps.

    Args:
        endpoint: How to reach peers, and who this one is.
        directory: What is kept in step.
        store: What keeps it for all.
        rng: The dice that decide when.
        wall_s: The clock on this machine's wall, in seconds since 1970.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        directory: Directory,
        store: Store,
        *,
        rng: random.Random,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(endpoint, directory, rng=rng, wall_s=wall_s)
        self._store = store
        self._pings = Pings(endpoint)
        self._unsaid: Entry | None = None
        self._said = anyio.Event()

    async def join(self) -> None:
        """Read what the store has.

        Raises:
            BootstrapFailed: If it cannot be reached.
        """
        try:
            await _take(self._view, await self._store.read())
        except SwarmError as error:
            await self._store.aclose()
            raise BootstrapFailed(error.message) from error

    async def leave(self) -> None:
        """Tell everyone that this peer is gone, as far as they can be told within one request's deadline."""
        entry, self._unsaid = self._voice.leave(anyio.current_time()), None
        try:
            if entry is not None:
                await self._store.put(self._endpoint.peer_id, entry.as_record(anyio.current_time(), has_body=True))
        except SwarmError as error:
            event(_LOG, "the swarm could not be told that this peer leaves", reason=error.message)

    async def run(self) -> None:
        """Keep in step until cancelled; while the store cannot be reached, try again and again."""
        async with _closing(self._store), anyio.create_task_group() as tasks:
            tasks.start_soon(_follow, self._store, self._view, self._config.heartbeat_s)
            tasks.start_soon(self._speak)
            tasks.start_soon(self._look_after_others)
            while True:
                self._spread(self._voice.refresh(anyio.current_time()))
                await anyio.sleep(self._config.gossip_interval_s / 2)

    async def handle(self, channel: Channel, message: Message) -> None:
        """Answer a message of another peer, as :meth:`Presence.handle` says.

        Raises:
            UsageError: If the other side wants to gossip.
            Error: As :meth:`Presence.handle`.
        """
        if isinstance(message, News):
            raise UsageError("this swarm keeps its directory in a store; give the same --directory as its other peers")
        await super().handle(channel, message)

    def _spread(self, entry: Entry | None) -> None:
        if entry is not None:
            self._unsaid = entry
            self._said.set()
            self._view.ring()

    async def _speak(self) -> None:
        """Put the newest that this peer says of itself into the store, as soon as that can be done."""
        while True:
            await self._said.wait()
            self._said = anyio.Event()
            while (entry := self._unsaid) is not None:
                try:
                    await self._store.put(self._endpoint.peer_id, entry.as_record(anyio.current_time(), has_body=True))
                except SwarmError:  # whoever follows the store says so
                    await anyio.sleep(self._config.heartbeat_s)
                else:
                    self._unsaid = None if self._unsaid is entry else self._unsaid

    async def _look_after_others(self) -> None:
        """Accuse those of the next few who cannot be reached."""
        failures: dict[PeerId, int] = {}
        while True:
            await anyio.sleep(self._config.lost_after_s / _TRIES)
            others = self._next_few()
            failures = {entry.announcement.peer: failures.get(entry.announcement.peer, 0) for entry in others}
            async with anyio.create_task_group() as tasks:
                for entry in others:
                    tasks.start_soon(self._look_after, entry, failures)

    def _next_few(self) -> list[Entry]:
        own = self._endpoint.peer_id
        living = {entry.announcement.peer: entry for entry in self._view.directory.live(anyio.current_time())}
        after = sorted(peer for peer in living if peer > own)
        before = sorted(peer for peer in living if peer < own)
        return [living[peer] for peer in islice(chain(after, before), self._config.fanout)]

    async def _look_after(self, entry: Entry, failures: dict[PeerId, int]) -> None:
        claim = entry.announcement
        try:
            await self._pings.ping(claim.peer, claim.addresses)
        except PeerBusy:
            return
        except Error as error:
            failures[claim.peer] += 1
            if failures[claim.peer] < _TRIES or entry.suspicion is not None:
                return
            event(_LOG, "a server cannot be reached", peer=claim.peer[:8], reason=error.message)
            suspicion = accuse(claim.peer, claim.sequence, self._endpoint.identity)
            if self._view.directory.suspect(suspicion, anyio.current_time()) != "suspected":
                return
            self._view.ring()
            try:
                await self._store.accuse(suspicion)
            except SwarmError:
                return
        else:
            failures[claim.peer] = 0


class StoreWatcher(Watcher):
    """Keeps a client's directory up to date from a store.

    Args:
        endpoint: Whose it is.
        directory: What is kept up to date.
        store: What keeps it for all.
        rng: The dice.
    """

    def __init__(self, endpoint: Endpoint, directory: Directory, store: Store, *, rng: random.Random) -> None:
        super().__init__(endpoint, directory, Contacts(), rng=rng)
        self._store = store

    async def run(self) -> None:
        """Follow the store until cancelled.

        Raises:
            BootstrapFailed: If it cannot be reached at first.
        """
        async with _closing(self._store):
            try:
                await _take(self._view, await self._store.read())
            except SwarmError as error:
                raise BootstrapFailed(error.message) from error
            await _follow(self._store, self._view, self._config.heartbeat_s)


@asynccontextmanager
async def _closing(store: Store) -> AsyncIterator[None]:
    try:
        yield
    finally:
        with anyio.CancelScope(shield=True):
            await store.aclose()


async def _take(view: View, reading: Reading) -> str:
    await view.hear(Publish(records=tuple(reading.records), suspicions=tuple(reading.suspicions), is_whole=True))
    now_s = view.in_step_s = anyio.current_time()
    view.directory.expire(now_s)
    view.ring()
    return reading.mark


async def _follow(store: Store, view: View, wait_s: float) -> None:
    """Keep a view in step with a store until cancelled, however often that goes away."""
    is_lost = False
    while True:
        try:
            mark = await _take(view, await store.read())
            read_again_s = anyio.current_time() + _READ_AGAIN_S
            if is_lost:
                event(_LOG, "the store of the directory is back")
            is_lost = False
            while anyio.current_time() < read_again_s:
                mark = await _take(view, await store.news(mark, wait_s))
        except SwarmError as error:
            if not is_lost:
                event(
                    _LOG,
                    "the store of the directory is lost; trying again",
                    level=logging.WARNING,
                    reason=error.message,
                )
            is_lost = True
            await anyio.sleep(wait_s)

"""How soon the peers of a swarm hear of each other: fifty real processes that gossip over TLS on one machine.

They serve nothing, so that the machine carries them: each is a fork of this process and announces what a server would.
"""

import multiprocessing
import multiprocessing.connection
import random
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, Final, NamedTuple

import anyio

from bench.report import Row, write_report
from corolla.swarm import Channel, Contacts, Directory, Endpoint, Gossip, Identity, SwarmConfig, TlsTransport
from corolla.terms import Announcement, PeerId
from corolla.testing.gossip import usual_announcement

__all__ = ["main", "measure"]

PROCESSES: Final = 50
NEWCOMERS, CHANGES, DEATHS = 5, 10, 5
AT_ONCE: Final = 4
PATIENCE_S: Final = 300.0
LOOK_S: Final = 0.01


class Seen(NamedTuple):
    """What changed in what one peer sees: for each other, its sessions, or ``None`` if it is seen no more."""

    by: PeerId
    at_s: float
    sessions: dict[PeerId, int | None]


class Joining(NamedTuple):
    """A peer begins to join."""

    peer: PeerId
    at_s: float
    address: str


def main() -> None:
    """Measure fifty processes, print the table, write the report."""
    write_report("propagation", measure(PROCESSES), "real processes on one machine, TLS over loopback")


def measure(processes: int, newcomers: int = NEWCOMERS, changes: int = CHANGES, deaths: int = DEATHS) -> list[Row]:
    """Let processes meet, join one by one, change, and die.

    Args:
        processes: How many.
        newcomers: How many of them join one by one, once the others know each other.
        changes: How many changes are followed.
        deaths: How many are killed.
    """
    swarm = Processes()
    rng = random.Random(processes)
    try:
        swarm.start()
        for number in range(processes - newcomers - 1):
            swarm.start()
            if number % AT_ONCE == 0:  # more of them would only wait for the processor
                swarm.wait_until(swarm.is_complete)
        swarm.wait_until(swarm.is_complete)
        snapshots_s = []
        for _ in range(newcomers):
            peer = swarm.start()
            swarm.wait_until(swarm.is_complete)
            snapshots_s.append(swarm.completed_s[peer] - swarm.joining[peer].at_s)
        arrivals_s: list[float] = []
        for peer in rng.sample([*swarm.running], changes):
            arrivals_s += swarm.follow_change(peer, sessions=8)
        gone_s = [swarm.follow_death(peer) for peer in rng.sample([*swarm.running], deaths)]
    finally:
        swarm.stop()
    arrivals_s.sort()
    name = f"{processes} processes"
    return [
        Row(f"{name}: a new peer sees all others, median of {newcomers}", statistics.median(snapshots_s), "s"),
        Row(f"{name}: the slowest of them", max(snapshots_s), "s"),
        Row(f"{name}: a change is known, median", statistics.median(arrivals_s), "s"),
        Row(f"{name}: 99th percentile", arrivals_s[int(0.99 * len(arrivals_s))], "s"),
        Row(f"{name}: to the last", arrivals_s[-1], "s"),
        Row(f"{name}: a killed one is out of every snapshot, median of {deaths}", statistics.median(gone_s), "s"),
        Row(f"{name}: the slowest of them", max(gone_s), "s"),
    ]


class Processes:
    """The processes, and what they have said.

    Attributes:
        running: For each peer, its process and the way to it.
        joining: When each began to join, and where.
        seen: For each peer, the sessions of those whom it sees.
        completed_s: When each saw all others last for the first time.
    """

    def __init__(self) -> None:
        self.running: dict[PeerId, tuple[Any, Connection]] = {}
        self.joining: dict[PeerId, Joining] = {}
        self.seen: dict[PeerId, dict[PeerId, int]] = {}
        self.completed_s: dict[PeerId, float] = {}
        self._watch: Callable[[Seen], None] = lambda _: None
        self._context = multiprocessing.get_context("fork")

    def start(self) -> PeerId:
        """Start one more, which joins the first; give its id once it listens."""
        contacts = [one.address for one in [*self.joining.values()][:1]]
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=live, args=(theirs, contacts), daemon=True)
        process.start()
        theirs.close()
        said = ours.recv()
        self.joining[said.peer], self.seen[said.peer] = said, {}
        self.running[said.peer] = process, ours
        return PeerId(said.peer)

    def is_complete(self) -> bool:
        """Whether all see all others."""
        return all(self.seen[peer].keys() >= self.running.keys() - {peer} for peer in self.running)

    def wait_until(self, is_so: Callable[[], bool]) -> None:
        """Listen to all until something is so.

        Raises:
            TimeoutError: If it is not so for too long.
        """
        until_s = time.monotonic() + PATIENCE_S
        while not is_so():
            if time.monotonic() > until_s:
                raise TimeoutError(f"after {PATIENCE_S:.0f} s not all processes see what they should")
            ways = [way for _, way in self.running.values()]
            ready = multiprocessing.connection.wait(ways, timeout=1.0)
            for way in (way for way in ways if way in ready):
                self._take(way.recv())

    def follow_change(self, peer: PeerId, sessions: int) -> list[float]:
        """Let a peer's load change, and say how long it took each other to know."""
        arrived_s: dict[PeerId, float] = {}

        def note(seen: Seen) -> None:
            if seen.sessions.get(peer) == sessions:
                arrived_s.setdefault(seen.by, seen.at_s)

        self._watch = note
        changed_s = time.monotonic()
        self.running[peer][1].send(sessions)
        self.wait_until(lambda: len(arrived_s) == len(self.running) - 1)
        self._watch = lambda _: None
        return [at_s - changed_s for at_s in arrived_s.values()]

    def follow_death(self, peer: PeerId) -> float:
        """Kill a peer, and say how long it took until nobody saw it."""
        process, way = self.running.pop(peer)
        killed_s = time.monotonic()
        process.kill()
        process.join()
        way.close()
        last_s = [killed_s]
        self._watch = lambda seen: last_s.append(seen.at_s) if seen.sessions.get(peer, 0) is None else None
        self.wait_until(lambda: not any(peer in self.seen[other] for other in self.running))
        self._watch = lambda _: None
        return max(last_s) - killed_s

    def stop(self) -> None:
        """End all processes."""
        for process, way in self.running.values():
            process.kill()
            process.join()
            way.close()

    def _take(self, seen: Seen) -> None:
        known = self.seen[seen.by]
        for peer, sessions in seen.sessions.items():
            if sessions is None:
                known.pop(peer, None)
            else:
                known[peer] = sessions
        if seen.by not in self.completed_s and known.keys() >= self.running.keys() - {seen.by}:
            self.completed_s[seen.by] = seen.at_s
        self._watch(seen)


def live(way: Connection, contacts: Sequence[str]) -> None:
    """Be one of the processes, until it is killed."""
    anyio.run(partial(Peer(way, contacts).run))


class Peer:
    """A peer that announces what a server would, and tells what it sees.

    Args:
        way: To the process that measures: it says how many sessions to claim, and hears what is seen.
        contacts: Where to join.
    """

    def __init__(self, way: Connection, contacts: Sequence[str]) -> None:
        self._way = way
        config, identity = SwarmConfig(), Identity.generate()
        self._endpoint = Endpoint(identity, [TlsTransport(identity, config)], config)
        self._gossip = Gossip(self._endpoint, Directory(config), Contacts(contacts), rng=random.Random())

    async def run(self) -> None:
        """Live."""
        async with self._endpoint, anyio.create_task_group() as tasks:
            await self._endpoint.listen("tls", "127.0.0.1", 0)
            tasks.start_soon(self._endpoint.serve, self._serve)
            address = f"{self._endpoint.addresses[0]}/{self._endpoint.peer_id}"
            self._way.send(Joining(self._endpoint.peer_id, time.monotonic(), address))
            await self._gossip.join()
            await self._gossip.announce(self._announcement(0))
            tasks.start_soon(self._gossip.run)
            tasks.start_soon(self._obey)
            await self._tell()

    async def _serve(self, channel: Channel) -> None:
        async for received in channel:
            await self._gossip.handle(channel, received.message)

    async def _obey(self) -> None:
        while True:
            sessions = await anyio.to_thread.run_sync(self._way.recv)
            await self._gossip.note(self._announcement(sessions))

    async def _tell(self) -> None:
        told: dict[PeerId, int] = {}
        while True:
            seen = {one.peer: one.sessions for one in self._gossip.snapshot().announcements}
            news: dict[PeerId, int | None] = {peer: n for peer, n in seen.items() if told.get(peer) != n}
            news |= dict.fromkeys(told.keys() - seen.keys())
            if news:
                self._way.send(Seen(self._endpoint.peer_id, time.monotonic(), news))
            told = seen
            await anyio.sleep(LOOK_S)

    def _announcement(self, sessions: int) -> Announcement:
        config = self._endpoint.config
        return usual_announcement(self._endpoint.peer_id, self._endpoint.addresses, sessions, ttl_s=config.ttl_s)


if __name__ == "__main__":
    main()

"""A directory in the event loop: who waits for changes is woken, who subscribes is told, and merging lets others run.

Owns the events; where records come from is known to ``directory/gossip.py`` and ``directory/watcher.py``.
"""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Final

import anyio
from anyio import lowlevel

from corolla.errors import BootstrapFailed, PeerBusy, SwarmError
from corolla.swarm.channel import Channel
from corolla.swarm.config import SwarmConfig
from corolla.swarm.directory.directory import Directory
from corolla.swarm.directory.pace import Allowance
from corolla.telemetry import event, logger
from corolla.terms import ModelId, PeerId, Snapshot
from corolla.wire import Publish, Record

__all__ = ["View"]

_LOG = logger(__name__)
_VERIFIED_AT_ONCE: Final = 8
_MAX_SUBSCRIBERS: Final = 4096  # whose subscriptions are counted
_GATHER_S: Final = 0.005  # so that what is learned in one moment goes into one message


class View:
    """What a program sees of the swarm.

    Args:
        directory: The copy that it looks at.
        config: How often subscribers hear something.

    Attributes:
        directory: The same.
        in_step_s: When the directory was last known to be in step with the swarm; ``None`` before it ever was.
        changed: Is set at the next change.
    """

    def __init__(self, directory: Directory, config: SwarmConfig) -> None:
        self.directory = directory
        self.in_step_s: float | None = None
        self.changed = anyio.Event()
        self._config = config
        self._subscriptions: dict[PeerId, Allowance] = {}
        self._has_warned = False

    @property
    def age_s(self) -> float:
        """Seconds since the directory was last known to be in step; infinite before it ever was."""
        return math.inf if self.in_step_s is None else anyio.current_time() - self.in_step_s

    def snapshot(self, model: ModelId | None = None) -> Snapshot:
        """View the announcements that hold now.

        Args:
            model: Only those of this model; ``None`` for all.
        """
        return self.directory.snapshot(anyio.current_time(), model=model, age_s=self.age_s)

    def ring(self) -> None:
        """Wake whoever waits for a change."""
        self.changed.set()
        self.changed = anyio.Event()

    async def merge(self, records: Sequence[Record], merge: Callable[[Record, float], object] | None = None) -> None:
        """Merge records, letting other tasks run in between, because each signature takes 0.1 ms.

        Args:
            records: From whomever.
            merge: What to do with each; ``None`` to put it into the directory.
        """
        merge = merge or self.directory.merge
        revision = self.directory.revision
        try:
            for number, record in enumerate(records, start=1):
                merge(record, anyio.current_time())
                if number % _VERIFIED_AT_ONCE == 0:
                    await lowlevel.checkpoint()
        finally:
            if self.directory.revision > revision:
                self.ring()
            self._warn_of_clocks()

    async def wait_for(
        self, predicate: Callable[[Snapshot], bool], deadline_s: float, *, complaint: Callable[[], str]
    ) -> Snapshot:
        """Wait until a snapshot is as it should be.

        Args:
            predicate: What it should be like; asked again after every change.
            deadline_s: How long to wait, in seconds.
            complaint: Says why nothing is seen at all.

        Returns:
            The first snapshot that is so.

        Raises:
            BootstrapFailed: If nothing was seen of the swarm by then.
            SwarmError: If something was, but it was not so.
        """
        with anyio.move_on_after(deadline_s):
            while True:
                changed = self.changed
                if self.in_step_s is not None and predicate(snapshot := self.snapshot()):
                    return snapshot
                now_s = anyio.current_time()
                expiry_s = self.directory.next_expiry_s(now_s)
                with anyio.move_on_after(None if expiry_s is None else expiry_s - now_s):
                    await changed.wait()
        if self.in_step_s is None:
            raise BootstrapFailed(complaint())
        count = len(self.snapshot().announcements)
        raise SwarmError(f"the swarm, of which {count} servers are seen, did not become as awaited in {deadline_s:g} s")

    async def serve_subscriber(self, channel: Channel) -> None:
        """Tell a subscriber everything, then every change, until it has gone.

        Raises:
            PeerBusy: If it subscribes again and again.
            Error: If it cannot be told, or does not read what it is told.
        """
        if not self._subscriptions.setdefault(channel.peer, Allowance(8, 0.2)).take(1, anyio.current_time()):
            raise PeerBusy("you have subscribed again and again", peer=channel.peer, retry_after_s=10.0)
        if len(self._subscriptions) > _MAX_SUBSCRIBERS:
            del self._subscriptions[next(iter(self._subscriptions))]
        revision = 0
        while True:
            changed = self.changed
            parts = list(self.directory.changes(revision, anyio.current_time()))
            revision = self.directory.revision
            for number, (records, suspicions) in enumerate(parts, start=1):
                publish = Publish(records=records, suspicions=suspicions, is_whole=number == len(parts))
                await channel.send(publish, deadline_s=self._config.request_s)
            with anyio.move_on_after(self._config.heartbeat_s):
                await changed.wait()
                await anyio.sleep(_GATHER_S)

    async def hear(self, publish: Publish) -> None:
        """Take in what a subscription brings."""
        await self.merge(publish.records)
        for suspicion in publish.suspicions:
            if self.directory.suspect(suspicion, anyio.current_time()) == "suspected":
                self.ring()

    def _warn_of_clocks(self) -> None:
        """Say once that announcements were dropped for their date: that is hard to find out otherwise."""
        verdicts = self.directory.verdicts
        if not self._has_warned and verdicts["future"] > verdicts["new"]:
            self._has_warned = True
            event(
                _LOG,
                "most announcements are dated ahead of this machine's clock and were dropped; is the clock right?",
                level=logging.WARNING,
                dropped=verdicts["future"],
            )

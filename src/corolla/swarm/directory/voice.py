"""What a server says of itself, and when: at once, if it matters, or when it is due. No input, output or clock."""

import logging
import random
from collections.abc import Callable
from typing import Final

import msgspec

from corolla.swarm.config import SwarmConfig
from corolla.swarm.directory.directory import Directory
from corolla.swarm.directory.entry import Entry
from corolla.swarm.directory.pace import Allowance, matters, refresh_s, steadied, ttl_s
from corolla.swarm.identity import Identity
from corolla.telemetry import event, logger
from corolla.terms import Announcement, Claim, ServerState

__all__ = ["Voice"]

_LOG = logger(__name__)
_FAREWELL_S: Final = 1.0  # for how long a leaver's last announcement is seen
_BURST: Final = 3  # changes of load in a row; then one for each time that it would be repeated anyway


class Voice:
    """One server's own announcements.

    Args:
        directory: Where they are put.
        identity: Whose they are.
        config: How often to repeat them.
        wall_s: The clock on this machine's wall, in seconds since 1970, from which sequences come.
        rng: The dice, so that not all repeat themselves at once.
    """

    def __init__(
        self,
        directory: Directory,
        identity: Identity,
        config: SwarmConfig,
        wall_s: Callable[[], float],
        rng: random.Random,
    ) -> None:
        self._directory = directory
        self._identity = identity
        self._config = config
        self._wall_s = wall_s
        self._rng = rng
        self._said: Claim | None = None
        self._truth: Claim | None = None
        self._due_s = 0.0
        self._changes = Allowance(_BURST, 1 / config.refresh_s)
        self._answers = Allowance(3, 1.0)

    @property
    def truth(self) -> Claim | None:
        """What this server says of itself now; ``None`` if it says nothing."""
        return self._truth

    def announce(self, announcement: Claim, now_s: float) -> Entry | None:
        """Say something at once; it is repeated until :meth:`leave`.

        Args:
            announcement: The claim. Its sequence does not matter: it gets the next one.
            now_s: The local monotonic time.

        Returns:
            What the directory has now; ``None`` if it has no room.

        Raises:
            FrameTooLarge: If the claim is over the limit of one record.
        """
        self._truth = announcement
        servers = self._directory.count(now_s)
        holds_s = max(announcement.ttl_s, ttl_s(self._config, servers))
        self._due_s = now_s + refresh_s(self._config, servers) * self._rng.uniform(0.9, 1.1)
        said = announcement if self._said is None else steadied(self._said, announcement)
        return self._say(msgspec.structs.replace(said, ttl_s=holds_s), now_s)

    def note(self, announcement: Claim, now_s: float) -> Entry | None:
        """Take note of what is so now; it is said at once if it matters to others, else when it is due.

        Args:
            announcement: The claim.
            now_s: The local monotonic time.

        Returns:
            What the directory has now, if something was said.

        Raises:
            FrameTooLarge: If the claim is over the limit of one record.
        """
        self._truth = announcement
        if self._said is not None and not matters(self._said, announcement):
            return None
        is_first = self._said is None or _state(announcement) != _state(self._said)
        per_s = 1 / refresh_s(self._config, self._directory.count(now_s))
        return self.announce(announcement, now_s) if is_first or self._changes.take(1, now_s, per_s=per_s) else None

    def refresh(self, now_s: float) -> Entry | None:
        """Repeat what is so, if it is due, if someone doubts that this server lives, or speaks under its name.

        Args:
            now_s: The local monotonic time.

        Returns:
            What the directory has now, if something was said.

        Raises:
            FrameTooLarge: If the claim is over the limit of one record.
        """
        if self._said is None or self._truth is None:
            return None
        own = self._directory.entry(self._said.peer)
        is_overtaken = own is not None and own.announcement.sequence > self._said.sequence
        is_doubted = own is not None and own.suspicion is not None
        if is_overtaken:
            event(
                _LOG,
                "an announcement newer than this peer's own was heard: it was restarted, its clock was set back, or "
                "another uses its identity file",
                level=logging.WARNING,
                peer=self._said.peer[:8],
            )
        if now_s >= self._due_s or ((is_overtaken or is_doubted) and self._answers.take(1, now_s)):
            return self.announce(self._truth, now_s)
        return None

    def leave(self, now_s: float) -> Entry | None:
        """Say that this server is gone, and nothing more.

        Args:
            now_s: The local monotonic time.

        Returns:
            What the directory has now, if anything had been said before.
        """
        said, self._truth = self._said, None
        if said is None:
            return None
        farewell = msgspec.structs.replace(said, ttl_s=_FAREWELL_S)
        if isinstance(farewell, Announcement):
            farewell = msgspec.structs.replace(farewell, state="draining")
        entry = self._say(farewell, now_s)
        self._said = None
        return entry

    def _say(self, announcement: Claim, now_s: float) -> Entry | None:
        # From the clock, so that a restarted peer overrules its former self; failing that, it finds itself overtaken.
        sequence = max(self._directory.sequence_of(announcement.peer) + 1, round(self._wall_s() * 1000))
        self._said = msgspec.structs.replace(announcement, sequence=sequence)
        self._directory.announce(self._said, self._identity, now_s)
        return self._directory.entry(announcement.peer)


def _state(claim: Claim) -> ServerState | None:
    return claim.state if isinstance(claim, Announcement) else None

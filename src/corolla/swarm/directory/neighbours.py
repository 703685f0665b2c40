"""Whom a server links to, whom it looks after, and whom it tries again. No input, output, clock or task.

A few neighbours are chosen at random among the living and exchanged now and then. Whose link broke is probed; whoever
is not seen, a contact or a peer that was lost, is tried again for ever, so that parts of a swarm that were cut off from
each other unite.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from corolla.errors import Error, PeerBusy
from corolla.swarm.config import SwarmConfig
from corolla.swarm.directory.directory import Directory
from corolla.swarm.directory.entry import Entry
from corolla.swarm.directory.link import Link
from corolla.swarm.finding.contacts import Contact, Contacts
from corolla.terms import PeerId

__all__ = ["Neighbours", "Visit"]

_FIRST_DOUBT_S: Final = 2.0
_LAST_DOUBT_S: Final = 60.0
_MAX_DOUBTS: Final = 64
_SHUN_S: Final = 60.0  # unless the error says otherwise


class Visit(NamedTuple):
    """A peer to be dialled.

    Args:
        contact: Whom.
        is_probe: Whether only to see if it lives; else for a link.
    """

    contact: Contact
    is_probe: bool = False


@dataclass(frozen=True, slots=True)
class _Doubt:
    due_s: float
    wait_s: float = _FIRST_DOUBT_S


class Neighbours:
    """Chooses whom to dial.

    Args:
        directory: Who is there.
        peer: Who chooses.
        contacts: Whom to turn to besides those in the directory.
        config: How many and how often.
        rng: The dice.
    """

    def __init__(
        self, directory: Directory, peer: PeerId, contacts: Contacts, config: SwarmConfig, rng: random.Random
    ) -> None:
        self._directory = directory
        self._peer = peer
        self._contacts = contacts
        self._config = config
        self._rng = rng
        self._visiting: set[Contact] = set()
        self._doubts: dict[PeerId, _Doubt] = {}
        self._shunned: dict[PeerId, float] = {}
        self._rotate_at_s = self._heal_at_s = 0.0

    def visits(self, links: Sequence[Link], now_s: float) -> list[Visit]:
        """Say who is to be dialled now, and what for; :meth:`returned` must follow for each.

        Args:
            links: Those that stand; one may be told to end.
            now_s: The local monotonic time.
        """
        self._shunned = {peer: until_s for peer, until_s in self._shunned.items() if until_s > now_s}
        live = [entry for entry in self._directory.live(now_s) if entry.announcement.peer != self._peer]
        visits = [Visit(contact) for contact in (*self._new(live, links, now_s), *self._lost(live, links, now_s))]
        visits += [Visit(contact, is_probe=True) for contact in self._doubtful(now_s)]
        self._visiting.update(visit.contact for visit in visits)
        return visits

    def returned(self, visit: Visit) -> None:
        """Take note that a visit is over or, if it was for a link, has begun one."""
        self._visiting.discard(visit.contact)

    def doubt(self, peer: PeerId, now_s: float) -> None:
        """See soon whether a peer lives."""
        if len(self._doubts) < _MAX_DOUBTS:
            self._doubts.setdefault(peer, _Doubt(now_s))

    def doubt_again(self, peer: PeerId, now_s: float) -> None:
        """After a visit in vain, see later."""
        doubt = self._doubts.get(peer, _Doubt(now_s))
        if len(self._doubts) < _MAX_DOUBTS:
            self._doubts[peer] = _Doubt(now_s + doubt.wait_s, min(2 * doubt.wait_s, _LAST_DOUBT_S))

    def trust(self, peer: PeerId) -> None:
        """Doubt a peer no more."""
        self._doubts.pop(peer, None)

    def shun(self, peer: PeerId, error: Error, now_s: float) -> None:
        """Link to others for as long as an error says."""
        wait_s = (error.retry_after_s if isinstance(error, PeerBusy) else error.ban_s) or _SHUN_S
        self._shunned[peer] = now_s + wait_s

    def is_shunned(self, peer: PeerId, now_s: float) -> bool:
        """Say whether not to link to a peer now."""
        return self._shunned.get(peer, 0.0) > now_s

    def candidates(self, live: Sequence[Entry]) -> list[Contact]:
        """List who may become a neighbour."""
        return [Contact(entry.announcement.peer, entry.announcement.addresses) for entry in live]

    def _new(self, live: Sequence[Entry], links: Sequence[Link], now_s: float) -> list[Contact]:
        """Choose new neighbours, if some are lacking or it is time to exchange one."""
        known = {link.peer for link in links} | self._shunned.keys() | self._doubts.keys()
        strangers = [
            one
            for one in self.candidates(live)
            if one.addresses and one.peer not in known | {self._peer} and one not in self._visiting
        ]
        ours = [link for link in links if link.is_ours and not link.is_leaving]
        lacking = self._config.fanout - len(ours) - len(self._visiting)
        if now_s >= self._rotate_at_s:
            self._rotate_at_s = now_s + self._config.rotate_s * self._rng.uniform(0.8, 1.2)
            if strangers and lacking <= 0 and ours:
                self._rng.choice(ours).leave()
                lacking += 1 if len(ours) <= self._config.fanout else 0
        return self._rng.sample(strangers, min(max(lacking, 0), len(strangers)))

    def _lost(self, live: Sequence[Entry], links: Sequence[Link], now_s: float) -> list[Contact]:
        """Now and then choose someone who is not seen; the whole swarm together does so about twice a second."""
        if now_s < self._heal_at_s:
            return []
        wait_s = self._config.heal_s * (1 + self._directory.count(now_s) / 10)
        if not links and not live:
            wait_s = self._config.gossip_interval_s
        self._heal_at_s = now_s + wait_s * self._rng.uniform(0.8, 1.2)
        own = self._directory.entry(self._peer)
        seen = {address for entry in live for address in entry.announcement.addresses}
        seen |= set(own.announcement.addresses) if own is not None else set()
        known = {link.peer for link in links} | self._shunned.keys() | {self._peer}
        lost = [one for one in (*self._contacts.all(), *self.candidates(self._directory.lost(now_s))) if one.addresses]
        pool = [
            one
            for one in lost
            if one.peer not in known and one not in self._visiting and not seen.intersection(one.addresses)
        ]
        return [self._rng.choice(pool)] if pool else []

    def _doubtful(self, now_s: float) -> list[Contact]:
        """List who is to be probed now: seen, but perhaps dead."""
        found = []
        for peer, doubt in [*self._doubts.items()]:
            entry = self._directory.entry(peer)
            if entry is None:
                del self._doubts[peer]
            elif doubt.due_s <= now_s < entry.expires_s:
                contact = Contact(peer, entry.announcement.addresses)
                found += [contact] if contact not in self._visiting else []
        return found

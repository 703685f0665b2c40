"""How servers keep their directories in step: what each says to a few neighbours. No input, output, clock or task.

Every server keeps links to a few others (``directory/neighbours.py``); about as many link to it. What is new to it is
named to its neighbours, who ask for what they lack; in between, directories are compared with a neighbour's by sums
over buckets, for whatever was missed (anti-entropy in the manner of van Renesse et al., 2008, *Efficient Reconciliation
and Flow Control for Anti-Entropy Protocols*). Neighbours notice death: when a link is lost and its peer cannot be
reached anew, the peer is accused, and what it may do about it is in ``directory/directory.py`` (suspicion as in SWIM:
Das et al., 2002).
"""

import random
from collections.abc import Callable, Sequence
from typing import Final

from corolla.errors import Error, PeerBusy, PeerLost, PeerMisbehaved, PeerTimeout, PeerUnreachable, SwarmError
from corolla.swarm.config import SwarmConfig
from corolla.swarm.directory.directory import Directory, Verdict
from corolla.swarm.directory.entry import Entry
from corolla.swarm.directory.link import Link, depth_of, split_ids
from corolla.swarm.directory.neighbours import Neighbours, Visit
from corolla.swarm.directory.pace import Allowance, reconcile_s
from corolla.swarm.directory.stamps import accuse, id_of, peer_of, read_stamp
from corolla.swarm.identity import Identity
from corolla.terms import PeerId
from corolla.wire import News, Record, Suspicion
from corolla.wire.limits import RECORD_ID_BYTES

__all__ = ["Exchange"]

_SILENCE: Final = (PeerUnreachable, PeerTimeout, PeerLost)  # which may mean that it is dead
_ASK_AGAIN_S: Final = 2.0
_MAX_LINKS_TO_ONE: Final = 2
_DAMAGED_PER_S: Final = 0.5  # from a neighbour of another version, perhaps


class Exchange:
    """What one server says to its neighbours and makes of what they say.

    Args:
        directory: What is kept in step.
        identity: Whose it is.
        neighbours: Chooses them.
        config: The limits.
        rng: The dice that choose whom to compare with.

    Attributes:
        links: Those that stand.
        in_step_s: When the directory was last known to be in step with a neighbour's.
    """

    def __init__(
        self, directory: Directory, identity: Identity, neighbours: Neighbours, config: SwarmConfig, rng: random.Random
    ) -> None:
        self._directory = directory
        self._identity = identity
        self._config = config
        self._rng = rng
        self._neighbours = neighbours
        self._asked: dict[bytes, float] = {}
        self._accusing = Allowance(8, 8 / 60)
        self._damaged = Allowance(16, _DAMAGED_PER_S)
        self._reconcile_at_s = 0.0
        self.links: list[Link] = []
        self.in_step_s: float | None = None

    # Links come and go

    def open(self, peer: PeerId, now_s: float, wake: Callable[[], None], *, is_ours: bool) -> Link:
        """Begin a link.

        Args:
            peer: With whom.
            now_s: The local monotonic time.
            wake: Called when something should be said on it at once.
            is_ours: Whether this side dialled.

        Raises:
            PeerBusy: If the other side dialled and there is no room.
        """
        same = sum(link.peer == peer for link in self.links)
        if not is_ours:
            count = sum(not link.is_ours for link in self.links)
            if count >= self._config.max_links or same >= _MAX_LINKS_TO_ONE or self._neighbours.is_shunned(peer, now_s):
                raise PeerBusy(
                    f"there are {count} links to here, {same} of them yours, and no room for more",
                    peer=self._identity.peer_id,
                    retry_after_s=self._config.rotate_s,
                )
        often_per_s = 3 / reconcile_s(self._config, self._directory.count(now_s))
        link = Link(peer, is_ours=is_ours, known=len(self._directory), compared_per_s=often_per_s, wake=wake)
        self.links.append(link)
        if is_ours:
            link.compare()
        if (own := self._directory.entry(self._identity.peer_id)) is not None:
            link.owe(own.announcement.peer, has_body=True)
        return link

    def close(self, link: Link, now_s: float, error: Error | None = None) -> None:
        """End a link, or take note of its end.

        Args:
            link: Which.
            now_s: The local monotonic time.
            error: Why, if it was not the will of either side.
        """
        self.links.remove(link)
        if error is None or link.is_leaving or any(other.peer == link.peer for other in self.links):
            return
        if not isinstance(error, _SILENCE):
            self._neighbours.shun(link.peer, error, now_s)
        else:
            self._neighbours.doubt(link.peer, now_s)

    # What is said

    def hear(self, link: Link, message: News, now_s: float) -> None:
        """Take in a message of a neighbour, but for its records; these go to :meth:`take`.

        Args:
            link: Where it came.
            message: The message.
            now_s: The local monotonic time.

        Raises:
            PeerMisbehaved: If it is not what an honest neighbour says.
        """
        link.check(message, now_s)
        for record_id in split_ids(message.ids):
            link.told(record_id)
            if self._directory.find(record_id) is None:
                self._ask(link, record_id, now_s)
        for ids, has_body in ((message.wanted, False), (message.bodies, True)):
            for record_id in split_ids(ids):
                self._give(link, record_id, has_body=has_body)
        for record_id in split_ids(message.gone):
            link.asked.pop(record_id, None)
        self._consider(link, message.suspicions, now_s)
        if message.sums:
            self._compare(link, message.sums, now_s)
        if message.listing is not None:
            self._go_through(link, message.listing, now_s)

    def take(self, link: Link, record: Record, now_s: float) -> Verdict:
        """Take in one record of a message.

        Args:
            link: Where it came.
            record: The record.
            now_s: The local monotonic time.

        Raises:
            PeerMisbehaved: If it is not what an honest neighbour sends.
            SwarmError: If it is the neighbour's own, and shows that the clocks differ too much.
        """
        verdict = self._directory.merge(record, now_s)
        record_id = id_of(record)
        link.told(record_id)
        link.asked.pop(record_id, None)
        self._asked.pop(record_id, None)
        entry = self._directory.find(record_id)
        if verdict == "new" and entry is not None:
            self._spread(entry, but=link)
        elif verdict == "bodiless":
            self._ask(link, record_id, now_s, has_body=True)
        elif verdict == "forged" or (verdict == "malformed" and not self._damaged.take(1, now_s)):
            raise PeerMisbehaved(f"peer {link.peer[:8]} sent a {verdict} announcement", peer=link.peer)
        elif verdict == "known" and entry is None:
            self._correct(link, record)
        elif verdict in ("expired", "future") and _subject(record) == link.peer and record.age_s < self._config.ttl_s:
            raise SwarmError(
                f"the announcement of peer {link.peer[:8]} is dated more than {self._config.clock_s:g} s off the clock "
                f"of peer {self._identity.peer_id[:8]}; set the clock that is wrong"
            )
        return verdict

    def settle(self, link: Link, now_s: float) -> None:
        """After a message was taken in: see whether directories are in step now."""
        if link.is_compared and all(asked_s + _ASK_AGAIN_S <= now_s for asked_s in link.asked.values()):
            link.asked.clear()
            link.is_in_step = True
            self.in_step_s = now_s

    def announced(self, entry: Entry) -> None:
        """Send this peer's own new announcement to all neighbours, to whom it is new for certain."""
        for link in self.links:
            link.owe(entry.announcement.peer, has_body=entry.has_new_body)
            if not entry.is_refresh:
                link.wake()

    def say(self, link: Link, now_s: float) -> News:
        """Give the next message for a neighbour."""
        return link.say(self._directory, now_s)

    # What is done by itself

    def tick(self, now_s: float) -> list[Visit]:
        """Do what is due, about every half second.

        Args:
            now_s: The local monotonic time.

        Returns:
            Peers to be dialled now, and what for.
        """
        if now_s >= self._reconcile_at_s:
            wait_s = reconcile_s(self._config, self._directory.count(now_s))
            self._reconcile_at_s = now_s + wait_s * self._rng.uniform(0.8, 1.2)
            self._directory.expire(now_s)
            self._forget(now_s)
            if self.links:
                self._rng.choice(self.links).compare()
        return self._neighbours.visits(self.links, now_s)

    def visited(self, visit: Visit, now_s: float, error: Error | None) -> None:
        """Take note of how a visit ended, or, if it was for a link, how it began.

        Args:
            visit: Which.
            now_s: The local monotonic time.
            error: Why it failed; ``None`` if it did not.
        """
        self._neighbours.returned(visit)
        peer = visit.contact.peer
        if peer is None:
            return
        if error is None or not isinstance(error, _SILENCE):
            self._neighbours.trust(peer)
            if error is not None:
                self._neighbours.shun(peer, error, now_s)
            return
        entry = self._directory.entry(peer)
        if entry is None or entry.expires_s <= now_s or any(link.peer == peer for link in self.links):
            return
        self._neighbours.doubt_again(peer, now_s)
        if entry.suspicion is None and self._accusing.take(1, now_s):
            accusation = accuse(peer, entry.announcement.sequence, self._identity)
            if self._directory.suspect(accusation, now_s) == "suspected":
                self._warn(peer)

    def _ask(self, link: Link, record_id: bytes, now_s: float, *, has_body: bool = False) -> None:
        if now_s - self._asked.get(record_id, -_ASK_AGAIN_S) >= _ASK_AGAIN_S and len(record_id) == RECORD_ID_BYTES:
            self._asked[record_id] = now_s
            link.want(record_id, now_s, has_body=has_body)

    def _give(self, link: Link, record_id: bytes, *, has_body: bool) -> None:
        entry = self._directory.find(record_id)
        if entry is None:
            link.miss(record_id)
        else:
            link.owe(entry.announcement.peer, has_body=has_body, wanted=record_id)
        link.wake()

    def _spread(self, entry: Entry, *, but: Link) -> None:
        """Name something new to all other neighbours; what only repeats itself can wait for the next sign of life."""
        for link in self.links:
            if link is not but and link.name(entry.id, instead_of=entry.older_id) and not entry.is_refresh:
                link.wake()

    def _warn(self, peer: PeerId, *, but: Link | None = None) -> None:
        entry = self._directory.entry(peer)
        for link in self.links:
            if link is not but and entry is not None and entry.suspicion is not None:
                link.warn(entry.suspicion)

    def _consider(self, link: Link, suspicions: Sequence[Suspicion], now_s: float) -> None:
        for suspicion in suspicions:
            doubt = self._directory.suspect(suspicion, now_s)
            if doubt == "forged":
                raise PeerMisbehaved(f"peer {link.peer[:8]} passed on a forged suspicion", peer=link.peer)
            if doubt == "suspected":
                self._warn(peer_of(suspicion.subject), but=link)

    def _correct(self, link: Link, record: Record) -> None:
        """Tell whoever sends an old stamp of the newer one; a restarted peer whose clock was set back needs it."""
        subject = _subject(record)
        entry = None if subject is None else self._directory.entry(subject)
        if entry is not None:
            link.owe(entry.announcement.peer, has_body=True)
            link.wake()

    def _compare(self, link: Link, sums: bytes, now_s: float) -> None:
        depth = depth_of(sums) or 0
        own = self._directory.sums(now_s, depth)
        theirs = [int.from_bytes(one) for one in split_ids(sums)]
        differing = [bucket for bucket, (one, other) in enumerate(zip(own, theirs, strict=True)) if one != other]
        link.answer(self._directory.ids(differing, now_s, depth))

    def _go_through(self, link: Link, listing: dict[int, bytes], now_s: float) -> None:
        """Find out from the other side's ids what either side lacks."""
        own = self._directory.ids(listing, now_s, link.depth or 0)
        link.depth, link.is_compared = None, True
        count = sum(map(len, listing.values())) // RECORD_ID_BYTES
        is_new_here = 2 * len(self._directory) < count
        for bucket, ids in listing.items():
            theirs = split_ids(ids)
            for record_id in theirs:
                link.told(record_id)
                entry = self._directory.find(record_id)
                if entry is None:
                    self._ask(link, record_id, now_s, has_body=is_new_here)
                elif entry.expires_s <= now_s and entry.suspicion is not None:
                    link.warn(entry.suspicion)
                elif entry.expires_s <= now_s:  # perhaps someone told a wrong age
                    self._ask(link, record_id, now_s)
            for record_id in set(own[bucket]).difference(theirs):
                if link.name(record_id):
                    link.wake()

    def _forget(self, now_s: float) -> None:
        old = [record_id for record_id, asked_s in self._asked.items() if asked_s + _ASK_AGAIN_S <= now_s]
        for record_id in old:
            del self._asked[record_id]


def _subject(record: Record) -> PeerId | None:
    stamp = read_stamp(record)
    return None if stamp is None else peer_of(stamp.peer)

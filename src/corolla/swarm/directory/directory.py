"""Where the swarm's announcements live: signed claims, merged without a coordinator. No input, output or clock.

Every peer holds a copy. Copies that have exchanged what the other lacked are equal, in whatever order they heard it: of
one peer's stamps the one with the highest sequence counts (with equal ones, which only a faulty peer makes, the greater
bytes do), and nothing else. Times are those of the local monotonic clock, passed in as ``now_s``. Records travel with
their age, so that machines need not agree on the time; the lowest age that is claimed for a stamp is believed, but
none that would make it younger than when it was first heard of. An expired claim stays in the table for a while,
unseen, so that neither a replay of it nor an older one can revive it; once it is forgotten, its date is too old.

A server that could not be reached may be accused. It is then seen for ``suspect_s`` more, time enough to hear of it
and refute it with a newer stamp, and not after that. Only servers in the table may accuse, each a few others a minute.
"""

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from itertools import takewhile
from typing import Final, Literal

import msgspec

from corolla.swarm.config import SwarmConfig
from corolla.swarm.directory.entry import Entry
from corolla.swarm.directory.stamps import (
    Body,
    batches,
    id_of,
    is_genuine,
    peer_of,
    read,
    read_body,
    read_stamp,
    sign,
    stands,
)
from corolla.swarm.identity import Identity
from corolla.terms import Announcement, Claim, ModelId, PeerId, RelayOffer, Snapshot
from corolla.wire import Record, Stamp, Suspicion

__all__ = ["Directory", "Doubt", "Verdict"]

Verdict = Literal["new", "known", "bodiless", "expired", "future", "malformed", "forged", "stranger", "full"]
"""What became of a record: taken, as new; not newer than what is here; of a body that is not here; dated too long ago;
dated ahead of all clocks; not an announcement; not signed by its peer; of a peer that may not serve here; or dropped
for want of room."""

Doubt = Literal["suspected", "known", "refuted", "groundless", "forged", "excessive"]
"""What became of a suspicion: taken, as new; known; refuted by a newer stamp; of or by a peer that is not here; not
signed by its accuser; or of one who has accused too many."""

_HARMLESS: Final[tuple[Verdict, ...]] = ("new", "known", "bodiless")
_MAX_SUSPICIONS: Final = 1024  # in one message
_DIGITS: Final = {digit: index for index, digit in enumerate("abcdefghijklmnopqrstuvwxyz234567")}
_ACCUSATIONS: Final = 8  # of one accuser,
_ACCUSATIONS_S: Final = 60.0  # in so many seconds
_YOUNGER_S: Final = 1.0  # smaller differences of age come from the journey


class Directory:
    """One peer's copy of the announcements.

    When the table is full, a peer that is not in it displaces the one that expired first, and is dropped if none has.

    Args:
        config: The limits.
        admits: Says whether the peer of an announcement may serve here; ``None`` in a public swarm, where all may.
        wall_s: The clock on this machine's wall, in seconds since 1970: what is dated more than ``clock_s`` ahead of
            it, or has expired by its own date for longer than that, is dropped. ``None`` to look at no date.

    Attributes:
        verdicts: How many records were merged with which verdict.
        replayed: How many of the known ones were older than the two newest of their peer.
        doubts: How many suspicions were heard with which result.
    """

    def __init__(
        self,
        config: SwarmConfig | None = None,
        *,
        admits: Callable[[Claim], bool] | None = None,
        wall_s: Callable[[], float] | None = None,
    ) -> None:
        self._admits = admits
        self._config = SwarmConfig() if config is None else config
        self._wall_s = wall_s
        self._entries: dict[PeerId, Entry] = {}
        self._peers: dict[bytes, PeerId] = {}  # by the ids of their newest stamp, and of the one before
        self._accusations: dict[PeerId, deque[float]] = {}
        self._revision = 0
        self.verdicts: Counter[Verdict] = Counter()
        self.replayed = 0
        self.doubts: Counter[Doubt] = Counter()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def revision(self) -> int:
        """A number that rises with every change of the table."""
        return self._revision

    @property
    def dropped(self) -> dict[str, int]:
        """How many announcements were dropped, and why; without those that honest peers send twice."""
        unwanted = {why: count for why, count in self.verdicts.items() if why not in _HARMLESS}
        return unwanted | ({"replayed": self.replayed} if self.replayed else {})

    def merge(self, record: Record, now_s: float) -> Verdict:
        """Take a record into account, if it is genuine and newer than what is here.

        Args:
            record: From whomever.
            now_s: The local monotonic time.

        Returns:
            What became of it; the directory has changed for all to see only if it is ``"new"``.
        """
        stamp = read_stamp(record) if 0.0 <= record.age_s <= 1e9 else None
        verdict: Verdict = "malformed" if stamp is None else self._judge(record, stamp, now_s)
        self.verdicts[verdict] += 1
        return verdict

    def announce(self, announcement: Claim, identity: Identity, now_s: float) -> Record:
        """Sign this peer's own announcement and put it into the directory.

        Args:
            announcement: The claim; its peer must be that of the identity, and its sequence higher than any before.
            identity: Whose claim it is.
            now_s: The local monotonic time.

        Returns:
            The record, for others.

        Raises:
            FrameTooLarge: If the claim is over the limit of one record.
        """
        known = self._entries.get(announcement.peer)
        record = sign(announcement, identity, None if known is None else known.body)
        self.merge(record, now_s)
        return record

    def suspect(self, suspicion: Suspicion, now_s: float) -> Doubt:
        """Take a suspicion into account.

        Args:
            suspicion: From whomever.
            now_s: The local monotonic time.

        Returns:
            What became of it; the directory has changed only if it is ``"suspected"``.
        """
        doubt = self._weigh(suspicion, now_s)
        self.doubts[doubt] += 1
        return doubt

    def entry(self, peer: PeerId) -> Entry | None:
        """Give what is known of a peer, even if it has expired."""
        return self._entries.get(peer)

    def find(self, record_id: bytes) -> Entry | None:
        """Give what is known of the peer whose newest stamp, or the one before, has this id."""
        peer = self._peers.get(record_id)
        return None if peer is None else self._entries[peer]

    def sequence_of(self, peer: PeerId) -> int:
        """Give the highest sequence heard of a peer, -1 if none was."""
        entry = self._entries.get(peer)
        return -1 if entry is None else entry.announcement.sequence

    def live(self, now_s: float) -> list[Entry]:
        """List what is seen now."""
        return [entry for entry in self._entries.values() if self._is_live(entry, now_s)]

    def count(self, now_s: float) -> int:
        """Count what is seen now."""
        return sum(self._is_live(entry, now_s) for entry in self._entries.values())

    def lost(self, now_s: float) -> list[Entry]:
        """List what has expired, or is suspected, and is not forgotten yet."""
        return [entry for entry in self._entries.values() if entry.expires_s <= now_s]

    def changes(self, revision: int, now_s: float) -> Iterator[tuple[tuple[Record, ...], tuple[Suspicion, ...]]]:
        """Give what changed after a revision to someone who knows all before it, in parts that fit into one message.

        Args:
            revision: The last one that the other side knows.
            now_s: The local monotonic time.
        """
        changed = list(takewhile(lambda entry: entry.revision > revision, reversed(self._entries.values())))
        suspicions = tuple(entry.suspicion for entry in changed if entry.suspicion is not None)[:_MAX_SUSPICIONS]
        for batch in batches(entry.as_record(now_s, has_body=entry.body_revision > revision) for entry in changed):
            yield batch, suspicions
            suspicions = ()

    def sums(self, now_s: float, depth: int) -> list[int]:
        """Give the directory in brief: for each bucket of peers the exclusive or of their stamps' ids.

        Args:
            now_s: The local monotonic time.
            depth: How many characters of a peer's id decide its bucket.
        """
        sums = [0] * 32**depth
        for entry in self.live(now_s):
            sums[_bucket(entry.announcement.peer, depth)] ^= int.from_bytes(entry.id)
        return sums

    def ids(self, buckets: Collection[int], now_s: float, depth: int) -> dict[int, list[bytes]]:
        """List the ids in some buckets."""
        found: dict[int, list[bytes]] = {bucket: [] for bucket in buckets}
        for entry in self.live(now_s):
            if (bucket := _bucket(entry.announcement.peer, depth)) in found:
                found[bucket].append(entry.id)
        return found

    def snapshot(self, now_s: float, *, model: ModelId | None = None, age_s: float = 0.0) -> Snapshot:
        """View the announcements that hold now.

        Args:
            now_s: The local monotonic time.
            model: Only those of this model; ``None`` for all.
            age_s: How long ago the directory was in step with the swarm, to be passed on.
        """
        alive = [entry.announcement for entry in self.live(now_s)]
        servers = (claim for claim in alive if isinstance(claim, Announcement))
        chosen = tuple(announcement for announcement in servers if model in (None, announcement.model))
        offers = tuple(claim for claim in alive if isinstance(claim, RelayOffer))
        return Snapshot(announcements=chosen, relay_offers=offers, age_s=age_s)

    def expire(self, now_s: float) -> None:
        """Forget what has been expired for so long that no copy can hold it any more."""
        for entry in [*self._entries.values()]:
            if entry.expires_s + self._config.keep_s <= now_s:
                self._drop(entry)
        for accuser, times in [*self._accusations.items()]:
            if times[-1] + _ACCUSATIONS_S <= now_s:
                del self._accusations[accuser]

    def next_expiry_s(self, now_s: float) -> float | None:
        """Say when the next announcement that holds now expires."""
        return min((entry.expires_s for entry in self._entries.values() if entry.expires_s > now_s), default=None)

    def _judge(self, record: Record, stamp: Stamp, now_s: float) -> Verdict:
        peer = peer_of(stamp.peer)
        known = self._entries.get(peer)
        if known is not None and (stamp.sequence, record.stamp) <= (known.announcement.sequence, known.record.stamp):
            self.replayed += self.find(id_of(record)) is None
            return self._hear_again(known, record, now_s)
        has_body = known is not None and known.body.hash == stamp.body
        if record.body is None and not has_body:
            return "bodiless"
        body, announcement = self._read(record, stamp, known.body if known is not None and has_body else None)
        if body is None or announcement is None:
            return "malformed"
        made_s = now_s - record.age_s
        expires_s = made_s + announcement.ttl_s
        date = self._date(announcement)
        if date is not None or expires_s + self._config.keep_s <= now_s:
            return date or "expired"
        if not self._is_genuine(record, stamp):
            return "forged"
        if not self._may_serve(announcement):
            return "stranger"
        if known is None and not self._has_room(now_s):
            return "full"
        self._revision += 1
        entry = Entry(
            announcement=announcement,
            record=msgspec.structs.replace(record, body=body.data),
            body=body,
            heard_s=now_s,
            made_s=made_s,
            expires_s=expires_s,
            revision=self._revision,
            body_revision=known.body_revision if known is not None and has_body else self._revision,
        )
        if known is not None:
            is_refresh = known.expires_s > now_s and known.suspicion is None and _says_the_same(known, entry)
            entry = replace(entry, older_id=known.id, is_refresh=is_refresh)
        self._put(entry)
        return "new" if expires_s > now_s else "expired"

    def _read(self, record: Record, stamp: Stamp, body: Body | None) -> tuple[Body | None, Claim | None]:
        body = body or read_body(stamp, record.body or b"")
        return body, None if body is None else read(stamp, body)

    def _is_genuine(self, record: Record, stamp: Stamp) -> bool:
        return is_genuine(record, stamp)

    def _hear_again(self, known: Entry, record: Record, now_s: float) -> Verdict:
        """Believe a lower age of the newest stamp, so that nobody can make others' claims expire early."""
        made_s = min(now_s - record.age_s, known.heard_s)
        if record.signature != known.record.signature or made_s < known.made_s + _YOUNGER_S or known.suspicion:
            return "known"
        was_seen = known.expires_s > now_s
        self._revision += 1
        expires_s = made_s + known.announcement.ttl_s
        self._put(replace(known, made_s=made_s, expires_s=expires_s, revision=self._revision))
        return "known" if was_seen or expires_s <= now_s else "new"

    def _date(self, announcement: Claim) -> Literal["expired", "future"] | None:
        """Say whether a claim is of a date that no clock of the swarm can show, if it is not far wrong."""
        if self._wall_s is None:
            return None
        early_s = announcement.sequence / 1000 - self._wall_s()
        if early_s > self._config.clock_s:
            return "future"
        return "expired" if early_s + announcement.ttl_s + self._config.clock_s < 0 else None

    def _weigh(self, suspicion: Suspicion, now_s: float) -> Doubt:
        accuser = peer_of(suspicion.accuser)
        accused, witness = self._entries.get(peer_of(suspicion.subject)), self._entries.get(accuser)
        if accused is None or witness is None or witness.expires_s <= now_s or accused is witness:
            return "groundless"
        if accused.announcement.sequence != suspicion.sequence:
            return "refuted" if accused.announcement.sequence > suspicion.sequence else "groundless"
        if accused.suspicion is not None or accused.expires_s <= now_s:
            return "known"
        times = self._accusations.get(accuser, deque(maxlen=_ACCUSATIONS))
        if len(times) == _ACCUSATIONS and times[0] > now_s - _ACCUSATIONS_S:
            return "excessive"
        if not stands(suspicion):
            return "forged"
        times.append(now_s)
        self._accusations[accuser] = times
        self._revision += 1
        expires_s = min(accused.expires_s, now_s + self._config.suspect_s)
        self._put(replace(accused, expires_s=expires_s, revision=self._revision, suspicion=suspicion))
        return "suspected"

    def _put(self, entry: Entry) -> None:
        """Put an entry at the end of the table, which stays in the order of revisions."""
        peer = entry.announcement.peer
        if (known := self._entries.pop(peer, None)) is not None and known.older_id is not None:
            self._peers.pop(known.older_id, None)
        self._entries[peer] = entry
        self._peers[entry.id] = peer
        if entry.older_id is not None:
            self._peers[entry.older_id] = peer

    def _drop(self, entry: Entry) -> None:
        del self._entries[entry.announcement.peer]
        for record_id in {entry.id, entry.older_id or entry.id}:
            self._peers.pop(record_id, None)

    def _is_live(self, entry: Entry, now_s: float) -> bool:
        return entry.expires_s > now_s and self._may_serve(entry.announcement)  # perhaps revoked since

    def _may_serve(self, announcement: Claim) -> bool:
        return self._admits is None or self._admits(announcement)

    def _has_room(self, now_s: float) -> bool:
        if len(self._entries) < self._config.max_peers:
            return True
        entry = min(self._entries.values(), key=lambda entry: entry.expires_s)
        if entry.expires_s > now_s:
            return False
        self._drop(entry)
        return True


def _says_the_same(one: Entry, other: Entry) -> bool:
    return msgspec.structs.replace(one.announcement, sequence=other.announcement.sequence) == other.announcement


def _bucket(peer: PeerId, depth: int) -> int:
    bucket = 0
    for digit in peer[:depth]:
        bucket = bucket * 32 + _DIGITS[digit]
    return bucket

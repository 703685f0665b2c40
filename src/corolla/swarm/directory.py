"""Where the swarm's announcements live: signed claims, merged without a coordinator. No input, output or clock.

Every peer holds a copy. Copies that have exchanged what the other lacked are equal, in whatever order they heard it: of
one peer's announcements the one with the highest sequence counts (with equal ones, which only a faulty peer makes, the
greater bytes do), and nothing else. Times are those of the local monotonic clock, passed in as ``now_s``. Records
travel with their age, so no two clocks are ever compared; the age is believed once, when a sequence is first heard of,
and hearing it again neither lengthens nor shortens the claim's life. An expired claim stays in the table for a while,
unseen, so that neither a replay of it nor an older one can revive it.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Final, Literal

import msgspec

from corolla.errors import FrameTooLarge
from corolla.swarm.config import SwarmConfig
from corolla.swarm.identity import Identity, verify
from corolla.terms import Announcement, Claim, ModelId, PeerId, RelayOffer, Snapshot
from corolla.wire import Record
from corolla.wire.limits import MAX_MESSAGE_BYTES, MAX_RECORD_BYTES, MAX_RECORDS

__all__ = ["Directory", "Verdict"]

Verdict = Literal["new", "known", "expired", "malformed", "forged", "stranger", "full"]
"""What became of a record: taken, as new; not newer than what is here; too old to be seen; not an announcement; not
signed by its peer; of a peer that may not serve here; or dropped for want of room."""

_CONTEXT: Final = b"corolla announcement 1\0"  # signed along, so that no other use of the key yields a valid record
_BATCH_BYTES: Final = MAX_MESSAGE_BYTES - MAX_RECORD_BYTES
_RECORD_OVERHEAD_BYTES: Final = 96  # signature, age and their tags
_ENCODER: Final = msgspec.msgpack.Encoder()
_DECODER: Final[msgspec.msgpack.Decoder[Claim]] = msgspec.msgpack.Decoder(Announcement | RelayOffer)


@dataclass(frozen=True, slots=True)
class _Entry:
    announcement: Claim
    body: bytes
    signature: bytes
    made_s: float
    revision: int

    @property
    def rank(self) -> tuple[int, bytes]:
        return self.announcement.sequence, self.body

    @property
    def expires_s(self) -> float:
        return self.made_s + self.announcement.ttl_s


class Directory:
    """One peer's copy of the announcements.

    When the table is full, a peer that is not in it displaces the one that expired first, and is dropped if none has.

    Args:
        config: The limits.
        admits: Says whether the peer of an announcement may serve here; ``None`` in a public swarm, where all may.

    Attributes:
        verdicts: How many records were merged with which verdict.
    """

    def __init__(self, config: SwarmConfig | None = None, *, admits: Callable[[Claim], bool] | None = None) -> None:
        self._admits = admits
        self._config = SwarmConfig() if config is None else config
        self._entries: dict[PeerId, _Entry] = {}
        self._revision = 0
        self.verdicts: Counter[Verdict] = Counter()

    def __len__(self) -> int:
        return len(self._entries)

    def merge(self, record: Record, now_s: float) -> Verdict:
        """Take a record into account, if it is genuine and newer than what is here.

        Args:
            record: From whomever.
            now_s: The local monotonic time.

        Returns:
            What became of it; the directory has changed for all to see only if it is ``"new"``.
        """
        verdict = self._judge(record, now_s)
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
        body = _ENCODER.encode(announcement)
        if len(body) > MAX_RECORD_BYTES:
            raise FrameTooLarge(
                f"an announcement of {len(body)} bytes is over the limit of {MAX_RECORD_BYTES}; use shorter names"
            )
        record = Record(body, identity.sign(_CONTEXT + body), 0.0)
        self.merge(record, now_s)
        return record

    @property
    def revision(self) -> int:
        """A number that rises with every change of the table."""
        return self._revision

    def changed_since(self, revision: int) -> list[PeerId]:
        """Give the peers whose record changed after a revision, the latest first."""
        changed = takewhile(lambda item: item[1].revision > revision, reversed(self._entries.items()))
        return [peer for peer, _ in changed]

    def sequence_of(self, peer: PeerId) -> int:
        """Give the highest sequence heard of a peer, -1 if none was."""
        entry = self._entries.get(peer)
        return -1 if entry is None else entry.announcement.sequence

    def digest(self) -> dict[PeerId, int]:
        """Give the highest sequence heard of every peer."""
        return {peer: entry.announcement.sequence for peer, entry in self._entries.items()}

    def delta(self, digest: Mapping[PeerId, int], now_s: float) -> tuple[tuple[Record, ...], tuple[PeerId, ...]]:
        """Compare with another copy.

        Args:
            digest: The other copy's.
            now_s: The local monotonic time.

        Returns:
            Records that are newer here, as many as one message holds, and the peers that are newer there.
        """
        newer = [peer for peer in self._entries if self.sequence_of(peer) > digest.get(peer, -1)]
        wanted = [peer for peer, sequence in digest.items() if sequence > self.sequence_of(peer)]
        return next(self.batches(newer, now_s), ()), tuple(wanted[:MAX_RECORDS])

    def batches(self, peers: Iterable[PeerId], now_s: float) -> Iterator[tuple[Record, ...]]:
        """Give the newest records of some peers, cut so that each batch fits into one message.

        Args:
            peers: Whose; unknown ones are passed over.
            now_s: The local monotonic time.
        """
        batch: list[Record] = []
        room_bytes = _BATCH_BYTES
        for entry in filter(None, map(self._entries.get, peers)):
            room_bytes -= len(entry.body) + _RECORD_OVERHEAD_BYTES
            if room_bytes < 0 or len(batch) == MAX_RECORDS:
                yield tuple(batch)
                batch, room_bytes = [], _BATCH_BYTES
            batch.append(Record(entry.body, entry.signature, max(0.0, now_s - entry.made_s)))
        if batch:
            yield tuple(batch)

    def snapshot(self, now_s: float, *, model: ModelId | None = None, age_s: float = 0.0) -> Snapshot:
        """View the announcements that hold now.

        Args:
            now_s: The local monotonic time.
            model: Only those of this model; ``None`` for all.
            age_s: How long ago the directory was in step with the swarm, to be passed on.
        """
        alive = [entry.announcement for entry in self._entries.values() if entry.expires_s > now_s]
        members = [claim for claim in alive if self._may_serve(claim)]  # perhaps revoked since
        servers = (claim for claim in members if isinstance(claim, Announcement))
        chosen = tuple(announcement for announcement in servers if model in (None, announcement.model))
        offers = tuple(claim for claim in members if isinstance(claim, RelayOffer))
        return Snapshot(announcements=chosen, relay_offers=offers, age_s=age_s)

    def expire(self, now_s: float) -> None:
        """Forget what has been expired for so long that no copy can hold it any more."""
        kept = {peer: entry for peer, entry in self._entries.items() if entry.expires_s + self._config.keep_s > now_s}
        self._entries = kept

    def next_expiry_s(self, now_s: float) -> float | None:
        """Say when the next announcement that holds now expires."""
        return min((entry.expires_s for entry in self._entries.values() if entry.expires_s > now_s), default=None)

    def _judge(self, record: Record, now_s: float) -> Verdict:
        if len(record.body) > MAX_RECORD_BYTES or not 0.0 <= record.age_s <= 1e9:
            return "malformed"
        try:
            announcement = _DECODER.decode(record.body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OverflowError):
            return "malformed"
        if isinstance(announcement, Announcement):
            spans = (announcement.span, announcement.next_span or announcement.span)
            if any(span.stop > announcement.num_blocks for span in spans):
                return "malformed"
        entry = _Entry(announcement, record.body, record.signature, now_s - record.age_s, self._revision + 1)
        known = self._entries.get(announcement.peer)
        if known is not None and entry.rank <= known.rank:
            return "known"
        if entry.expires_s + self._config.keep_s <= now_s:
            return "expired"
        if not verify(announcement.peer, _CONTEXT + record.body, record.signature):
            return "forged"
        if not self._may_serve(announcement):
            return "stranger"
        if known is None and not self._has_room(now_s):
            return "full"
        self._revision += 1
        self._entries.pop(announcement.peer, None)  # so that the table stays in the order of revisions
        self._entries[announcement.peer] = entry
        return "new" if entry.expires_s > now_s else "expired"

    def _may_serve(self, announcement: Claim) -> bool:
        return self._admits is None or self._admits(announcement)

    def _has_room(self, now_s: float) -> bool:
        if len(self._entries) < self._config.max_peers:
            return True
        peer, entry = min(self._entries.items(), key=lambda item: item[1].expires_s)
        if entry.expires_s > now_s:
            return False
        del self._entries[peer]
        return True

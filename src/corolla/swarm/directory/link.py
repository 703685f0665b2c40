"""One link between two servers as one side sees it: what the other side knows, wants and is owed. No input or output.

Named first, sent when wanted: a stamp's name has eight bytes, so that a peer with six neighbours is told of it six
times and gets it once. What to do about what is heard is known to ``directory/exchange.py``.
"""

from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import Final

from corolla.errors import PeerMisbehaved
from corolla.swarm.directory.directory import Directory
from corolla.swarm.directory.pace import Allowance
from corolla.swarm.directory.stamps import batches, id_of
from corolla.terms import PeerId
from corolla.wire import News, Record, Suspicion
from corolla.wire.limits import MAX_IDS, RECORD_ID_BYTES

__all__ = ["Link", "depth_of", "split_ids"]

_MAX_SUSPICIONS: Final = 1024
_REMEMBERED: Final = 4096
_IDS_AT_ONCE: Final = 4096
_DEPTHS: Final = ((32, 0), (1024, 1))


class Link:
    """What is to be said to one neighbour.

    Args:
        peer: Who.
        is_ours: Whether this side dialled.
        known: How many announcements there are to ask for, about.
        compared_per_s: How often the other side may want to compare directories, on average.
        wake: Called when something should be said at once.

    Attributes:
        asked: Ids whose records this side awaits from it, and since when.
        depth: Of the sums whose listing is awaited; see :meth:`~corolla.swarm.Directory.sums`.
        is_compared: Whether the two directories were compared.
        is_in_step: Whether all that was lacking here has come since.
        is_leaving: Whether this side is about to end the link.
    """

    def __init__(
        self, peer: PeerId, *, is_ours: bool, known: int, compared_per_s: float, wake: Callable[[], None]
    ) -> None:
        self.peer: Final = peer
        self.is_ours: Final = is_ours
        self.wake: Final = wake
        self.asked: dict[bytes, float] = {}
        self.depth: int | None = None
        self.is_compared = False
        self.is_in_step = False
        self.is_leaving = False
        self._is_curious = False
        self._told: dict[bytes, None] = {}
        self._ids: dict[bytes, None] = {}
        self._owed: dict[PeerId, bool] = {}
        self._asked_for: dict[bytes, PeerId] = {}
        self._wanted: dict[bytes, bool] = {}
        self._gone: list[bytes] = []
        self._suspicions: deque[Suspicion] = deque(maxlen=_MAX_SUSPICIONS)
        self._listing: dict[int, list[bytes]] | None = None
        self._hearing = Allowance(4 * MAX_IDS, 2000.0)
        self._giving = Allowance(2000 + 2 * known, 200.0)
        self._comparing = Allowance(20, compared_per_s)

    def __repr__(self) -> str:
        return f"Link({self.peer[:8]}, {'ours' if self.is_ours else 'theirs'})"

    @property
    def is_at_rest(self) -> bool:
        """Whether nothing waits to be said."""
        return not (self._ids or self._owed or self._wanted or self._suspicions or self._listing or self._is_curious)

    def check(self, message: News, now_s: float) -> None:
        """Measure what is heard against what an honest neighbour says.

        Raises:
            PeerMisbehaved: If it is too much, or makes no sense.
        """
        named = len(message.ids) + sum(map(len, (message.listing or {}).values()))
        asked = (len(message.wanted) + len(message.bodies)) // RECORD_ID_BYTES
        heard = 1 + named // RECORD_ID_BYTES + len(message.records) + len(message.suspicions)
        if not self._hearing.take(heard, now_s):
            raise self._blame(f"told of {heard} announcements at once, after many others")
        if asked and not self._giving.take(asked, now_s):
            raise self._blame(f"asked for {asked} announcements at once, after many others")
        if message.sums and not self._comparing.take(1, now_s):
            raise self._blame("wants to compare directories again and again")
        if message.sums and depth_of(message.sums) is None:
            raise self._blame(f"compares directories in {len(message.sums)} bytes, which is no number of buckets")
        if message.listing is not None and self.depth is None:
            raise self._blame("lists announcements that nobody asked for")

    def told(self, record_id: bytes) -> None:
        """Note that the other side knows a stamp."""
        self._ids.pop(record_id, None)
        self._told[record_id] = None
        if len(self._told) > _REMEMBERED:
            del self._told[next(iter(self._told))]

    def name(self, record_id: bytes, *, instead_of: bytes | None = None) -> bool:
        """Name a stamp next time, unless the other side knows it.

        Args:
            record_id: Which.
            instead_of: The one that it replaces.

        Returns:
            Whether it will be named.
        """
        if instead_of is not None:
            self._ids.pop(instead_of, None)
        if record_id in self._told:
            return False
        self._ids[record_id] = None
        return True

    def owe(self, peer: PeerId, *, has_body: bool, wanted: bytes | None = None) -> None:
        """Send what is known of a peer next time.

        Args:
            peer: Whom.
            has_body: Whether the other side needs the body.
            wanted: The id that the other side asked for, if it did.
        """
        self._owed[peer] = has_body or self._owed.get(peer, False)
        if wanted is not None:
            self._asked_for[wanted] = peer

    def miss(self, record_id: bytes) -> None:
        """Say next time that a stamp is no more."""
        self._gone.append(record_id)

    def want(self, record_id: bytes, now_s: float, *, has_body: bool) -> None:
        """Ask for a record next time."""
        self._wanted[record_id] = has_body
        self.asked[record_id] = now_s
        self.wake()

    def warn(self, suspicion: Suspicion) -> None:
        """Pass on a suspicion at once."""
        self._suspicions.append(suspicion)
        self.wake()

    def answer(self, listing: dict[int, list[bytes]]) -> None:
        """Answer sums at once."""
        self._listing = listing
        self.wake()

    def compare(self) -> None:
        """Ask for a comparison at once, unless one is under way."""
        if self.depth is None:
            self._is_curious = True
            self.wake()

    def leave(self) -> None:
        """End the link once all is said."""
        self.is_leaving = True
        self.wake()

    def say(self, directory: Directory, now_s: float) -> News:
        """Give the next message; what does not fit into it follows, and is woken for.

        Args:
            directory: The one that is spoken of.
            now_s: The local monotonic time.
        """
        ids = list(islice(self._ids, _IDS_AT_ONCE))
        for record_id in ids:
            self.told(record_id)
        wanted, self._wanted = self._wanted, {}
        records = self._pay(directory, now_s)
        gone, self._gone = self._gone[:MAX_IDS], []
        suspicions, listing = tuple(self._suspicions), self._listing
        self._suspicions.clear()
        self._listing = None
        message = News(
            ids=b"".join(ids),
            wanted=b"".join(record_id for record_id, has_body in wanted.items() if not has_body),
            bodies=b"".join(record_id for record_id, has_body in wanted.items() if has_body),
            gone=b"".join(gone),
            records=records,
            suspicions=suspicions,
            sums=self._sums(directory, now_s) if self._is_curious else b"",
            listing=None if listing is None else {bucket: b"".join(found) for bucket, found in listing.items()},
            is_last=self.is_leaving and not (self._owed or self._ids),
        )
        if self._owed or self._ids:
            self.wake()
        return message

    def _pay(self, directory: Directory, now_s: float) -> tuple[Record, ...]:
        """Take as many of the owed records as fit into a message, and note which of those asked for are no more."""
        owed = [(peer, entry) for peer in self._owed if (entry := directory.entry(peer)) is not None]
        bodies = (self._owed[peer] or entry.has_new_body for peer, entry in owed)
        records = (entry.as_record(now_s, has_body=body) for (_, entry), body in zip(owed, bodies, strict=True))
        batch = next(batches(records))
        left = {peer: self._owed[peer] for peer, _ in owed[len(batch) :]}
        self._owed = left
        sent = {id_of(record) for record in batch}
        for record_id in sent:
            self.told(record_id)
        for record_id, peer in [*self._asked_for.items()]:
            if peer not in left:
                del self._asked_for[record_id]
                if record_id not in sent:
                    self._gone.append(record_id)
        return batch

    def _sums(self, directory: Directory, now_s: float) -> bytes:
        count = len(directory)
        self._is_curious = False
        self.depth = next((depth for most, depth in _DEPTHS if count <= most), 2)
        return b"".join(one.to_bytes(RECORD_ID_BYTES) for one in directory.sums(now_s, self.depth))

    def _blame(self, what: str) -> PeerMisbehaved:
        return PeerMisbehaved(f"peer {self.peer[:8]} {what}", peer=self.peer)


def split_ids(ids: bytes) -> list[bytes]:
    """Cut a list of ids into its ids; what is left over names nothing."""
    return [ids[start : start + RECORD_ID_BYTES] for start in range(0, len(ids), RECORD_ID_BYTES)]


def depth_of(sums: bytes) -> int | None:
    """Say how many characters of a peer's id decide its bucket in these sums; ``None`` if they are none."""
    return {1: 0, 32: 1, 1024: 2}.get(len(sums) // RECORD_ID_BYTES) if len(sums) % RECORD_ID_BYTES == 0 else None

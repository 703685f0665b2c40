"""One row of the directory: what is the newest that is known of a peer, and since when."""

from dataclasses import dataclass

import msgspec

from corolla.swarm.directory.stamps import Body, id_of
from corolla.terms import Claim
from corolla.wire import Record, Suspicion

__all__ = ["Entry"]


@dataclass(frozen=True, slots=True)
class Entry:
    """The newest that is known of one peer.

    Args:
        announcement: What it says.
        record: As it was signed, with its body.
        body: Its body.
        heard_s: When its stamp was first heard.
        made_s: When it was made, as far as known.
        expires_s: When it ceases to be seen.
        revision: Of the directory, when it changed last.
        body_revision: Of the directory, when the body came.
        older_id: The id of the stamp before, if any.
        is_refresh: Whether it says the same as the stamp before, which was still valid.
        suspicion: Why it will not be seen for much longer.
    """

    announcement: Claim
    record: Record
    body: Body
    heard_s: float
    made_s: float
    expires_s: float
    revision: int
    body_revision: int
    older_id: bytes | None = None
    is_refresh: bool = False
    suspicion: Suspicion | None = None

    @property
    def id(self) -> bytes:
        """The id of its stamp."""
        return id_of(self.record)

    @property
    def has_new_body(self) -> bool:
        """Whether the body came with this stamp."""
        return self.body_revision == self.revision

    def as_record(self, now_s: float, *, has_body: bool) -> Record:
        """Give it as it should be sent now."""
        age_s = max(0.0, now_s - self.made_s)
        return msgspec.structs.replace(self.record, age_s=age_s, body=self.body.data if has_body else None)

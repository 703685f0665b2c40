"""What travels of an announcement: a body that seldom changes, and the small signed stamp that keeps it valid.

The stamp names the body by its hash, so its one signature covers both; a body is sent only to those who lack it. Knows
the shapes and their bounds. What is in a body and who may be believed is known to ``swarm/directory/directory.py``.
"""

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from corolla.wire.limits import MAX_RECORD_BYTES, MAX_STAMP_BYTES

__all__ = ["Record", "Stamp", "Suspicion"]

_Count = Annotated[int, Meta(ge=0, le=2**53)]
_Key = Annotated[bytes, Meta(min_length=32, max_length=32)]
_Signature = Annotated[bytes, Meta(min_length=64, max_length=64)]


class Stamp(msgspec.Struct, frozen=True, array_like=True):
    """What a peer signs about itself.

    Args:
        peer: Who, as the 32 bytes of its key.
        sequence: Rises with every stamp of this peer: the milliseconds since 1970 by its own clock, or more.
        body: The first 16 bytes of the SHA-256 of the body that is meant.
        changes: Fields of the announcement that differ from the body's by now: load, state, time to live.
    """

    peer: _Key
    sequence: _Count
    body: Annotated[bytes, Meta(min_length=16, max_length=16)]
    changes: dict[str, Any]


class Record(msgspec.Struct, frozen=True, array_like=True):
    """A signed announcement on its way through the swarm.

    Args:
        stamp: The encoded :class:`Stamp`, exactly as it was signed.
        signature: Ed25519, by the stamp's peer.
        age_s: How long ago it was made, as far as the sender knows.
        body: The encoded :class:`~corolla.terms.Announcement` without its peer and sequence; ``None`` if the other
            side is thought to have it.
    """

    stamp: Annotated[bytes, Meta(max_length=MAX_STAMP_BYTES)]
    signature: _Signature
    age_s: Annotated[float, Meta(ge=0, le=1e9)]
    body: Annotated[bytes, Meta(max_length=MAX_RECORD_BYTES)] | None = None


class Suspicion(msgspec.Struct, frozen=True, array_like=True):
    """A server's signed word that it could not reach another one.

    Args:
        subject: Whom, as the 32 bytes of its key.
        sequence: Of the newest stamp that the accuser has of it; a newer one refutes the suspicion.
        accuser: Who says so, as the 32 bytes of its key.
        signature: Ed25519, by the accuser.
    """

    subject: _Key
    sequence: _Count
    accuser: _Key
    signature: _Signature

"""How an announcement becomes a record that its peer has signed, and a record an announcement. No input, output, clock.

A record is a body and a stamp (``wire/records.py``). While little changes, a peer signs stamps upon the body that it
has sent before, with the few fields that differ by now; a stamp has 130 bytes then, a body five times as many.
"""

import base64
import hashlib
from collections.abc import Iterable, Iterator
from typing import Any, Final

import msgspec

from corolla.errors import FrameTooLarge
from corolla.swarm.identity import Identity, verify
from corolla.terms import Announcement, Claim, PeerId, RelayOffer
from corolla.wire import Record, Stamp, Suspicion
from corolla.wire.limits import MAX_MESSAGE_BYTES, MAX_RECORD_BYTES, MAX_RECORDS, RECORD_ID_BYTES

__all__ = [
    "Body",
    "accuse",
    "batches",
    "id_of",
    "is_genuine",
    "key_of",
    "peer_of",
    "read",
    "read_body",
    "read_stamp",
    "sign",
    "stands",
]

_ANNOUNCED: Final = b"corolla announcement 2\0"  # signed along, so that no other use of the key yields a valid record
_SUSPECTED: Final = b"corolla suspicion 1\0"
_MAX_CHANGES_BYTES: Final = 128
_BATCH_BYTES: Final = MAX_MESSAGE_BYTES // 4
_RECORD_OVERHEAD_BYTES: Final = 96  # signature, age and their tags
_ENCODER: Final = msgspec.msgpack.Encoder()
_STAMPS: Final = msgspec.msgpack.Decoder(Stamp)
_BODIES: Final = msgspec.msgpack.Decoder(dict[str, Any])
_DAMAGE: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OverflowError, ValueError)


class Body(msgspec.Struct, frozen=True):
    """A body, encoded and decoded.

    Args:
        data: As it travels.
        fields: What is in it.
        hash: How stamps name it.
    """

    data: bytes
    fields: dict[str, Any]
    hash: bytes


def key_of(peer: PeerId) -> bytes:
    """Give the 32 bytes of a peer's key."""
    return base64.b32decode(peer.upper() + "====")


def peer_of(key: bytes) -> PeerId:
    """Give the peer whose key has these 32 bytes."""
    return PeerId(base64.b32encode(key).decode().rstrip("=").lower())


def id_of(record: Record) -> bytes:
    """Give the id of a record's stamp."""
    return record.signature[:RECORD_ID_BYTES]


def sign(announcement: Claim, identity: Identity, known: Body | None) -> Record:
    """Make a record, upon a body that is already known if little has changed since.

    Args:
        announcement: The claim.
        identity: Whose it is.
        known: The body of this peer's last record.

    Raises:
        FrameTooLarge: If the claim is over the limit of one record.
    """
    fields = msgspec.to_builtins(announcement, builtin_types=(bytes,))
    del fields["peer"], fields["sequence"]
    if known is not None:
        changes = {
            name: value for name, value in fields.items() if name not in known.fields or known.fields[name] != value
        }
        if len(_ENCODER.encode(changes)) <= _MAX_CHANGES_BYTES:
            return _stamp(announcement, identity, known, changes)
    data = _ENCODER.encode(fields)
    if len(data) > MAX_RECORD_BYTES:
        raise FrameTooLarge(
            f"an announcement of {len(data)} bytes is over the limit of {MAX_RECORD_BYTES}; use shorter names"
        )
    return _stamp(announcement, identity, Body(data, fields, _hash(data)), {})


def _stamp(announcement: Claim, identity: Identity, body: Body, changes: dict[str, Any]) -> Record:
    stamp = _ENCODER.encode(Stamp(key_of(announcement.peer), announcement.sequence, body.hash, changes))
    return Record(stamp, identity.sign(_ANNOUNCED + stamp), 0.0, body.data)


def read_stamp(record: Record) -> Stamp | None:
    """Decode a record's stamp; ``None`` if it is none."""
    try:
        return _STAMPS.decode(record.stamp)
    except _DAMAGE:
        return None


def read_body(stamp: Stamp, data: bytes) -> Body | None:
    """Decode the body of a stamp; ``None`` if it is none, or not the one that is meant."""
    try:
        fields = _BODIES.decode(data)
    except _DAMAGE:
        return None
    return Body(data, fields, stamp.body) if _hash(data) == stamp.body else None


def read(stamp: Stamp, body: Body) -> Claim | None:
    """Put an announcement together; ``None`` if there is none that is so."""
    fields = body.fields | stamp.changes | {"peer": peer_of(stamp.peer), "sequence": stamp.sequence}
    try:
        claim: Claim = msgspec.convert(fields, Announcement | RelayOffer)
    except _DAMAGE:
        return None
    if not isinstance(claim, Announcement):
        return claim
    spans = (claim.span, claim.next_span or claim.span)
    return None if any(span.stop > claim.num_blocks for span in spans) else claim


def is_genuine(record: Record, stamp: Stamp) -> bool:
    """Say whether a record's stamp was signed by its peer."""
    return verify(peer_of(stamp.peer), _ANNOUNCED + record.stamp, record.signature)


def accuse(subject: PeerId, sequence: int, identity: Identity) -> Suspicion:
    """Sign that a peer could not be reached."""
    said = Suspicion(key_of(subject), sequence, key_of(identity.peer_id), bytes(64))
    return msgspec.structs.replace(said, signature=identity.sign(_accusation(said)))


def stands(suspicion: Suspicion) -> bool:
    """Say whether a suspicion was signed by its accuser."""
    return verify(peer_of(suspicion.accuser), _accusation(suspicion), suspicion.signature)


def _accusation(suspicion: Suspicion) -> bytes:
    return _SUSPECTED + suspicion.subject + suspicion.sequence.to_bytes(8, "big") + suspicion.accuser


def batches(records: Iterable[Record]) -> Iterator[tuple[Record, ...]]:
    """Cut records into parts that fit into one message each; none make one empty part."""
    batch: list[Record] = []
    room_bytes = _BATCH_BYTES
    for record in records:
        if room_bytes < MAX_RECORD_BYTES or len(batch) == MAX_RECORDS:
            yield tuple(batch)
            batch, room_bytes = [], _BATCH_BYTES
        batch.append(record)
        room_bytes -= len(record.stamp) + len(record.body or b"") + _RECORD_OVERHEAD_BYTES
    yield tuple(batch)


def _hash(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:16]

"""Who may be in a private swarm: what a peer shows of itself, and how it judges what others show. Knows no socket.

A *proof* is a grant (``members/invite.py``) and the signature of its invite's key under a peer's id: swarm key, invite
key, peer id. It says nothing without the peer's own key, which the transport has checked, so it may be seen by anyone.
The owner's list of *revoked* invites is signed and numbered; the newest that was heard counts.
"""

import logging
import secrets
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Final

import anyio
import msgspec
from msgspec import Meta

from corolla.errors import NotAMember, PeerStranger, RemoteProtocolError, UsageError
from corolla.swarm.identity import Identity, verify
from corolla.swarm.members.invite import Grant, Invite, InviteId, SwarmId, describe_time
from corolla.terms import PEER_ID_PATTERN, Claim, PeerId
from corolla.wire.limits import MAX_PROOF_BYTES

__all__ = ["Membership", "Revocations"]

_LOG = logging.getLogger(__name__)
_PEER_CONTEXT: Final = b"corolla member 1\0"
_LIST_CONTEXT: Final = b"corolla revocations 1\0"
_MAX_REVOKED: Final = 1024
_REMEMBERED_PROOFS: Final = 16384
_ENCODER: Final = msgspec.msgpack.Encoder()
_DECODE_ERRORS: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OverflowError)
_SwarmId = Annotated[SwarmId, Meta(pattern=PEER_ID_PATTERN)]
_InviteId = Annotated[InviteId, Meta(pattern=PEER_ID_PATTERN)]
_Signature = Annotated[bytes, Meta(min_length=64, max_length=64)]


class _Proof(msgspec.Struct, frozen=True, array_like=True):
    grant: Grant
    signature: _Signature  # by the key of the invite, over the peer's id


class Revocations(msgspec.Struct, frozen=True, array_like=True):
    """The invites to one swarm that do not count any more.

    Args:
        swarm: Whose.
        number: Rises with every list; the highest counts.
        invites: Which, with the time at which each would have expired anyway, after which it need not be here.
        signature: By the swarm's key, over all the others.
    """

    swarm: _SwarmId
    number: Annotated[int, Meta(ge=0, le=2**53)]
    invites: Annotated[dict[_InviteId, int | None], Meta(max_length=_MAX_REVOKED)]
    signature: _Signature = bytes(64)

    @classmethod
    def issue(cls, key: Identity, number: int, invites: dict[InviteId, int | None]) -> "Revocations":
        """Sign a list.

        Args:
            key: The swarm's.
            number: Higher than any before.
            invites: Which, and when each would expire.

        Raises:
            UsageError: If there are too many.
        """
        if len(invites) > _MAX_REVOKED:
            raise UsageError(
                f"a swarm can have {_MAX_REVOKED} revoked invites that have not expired, not {len(invites)}; make "
                "invites that expire, or a new swarm"
            )
        unsigned = cls(SwarmId(key.peer_id), number, invites)
        return msgspec.structs.replace(unsigned, signature=key.sign(unsigned._signed_bytes()))

    @classmethod
    def decode(cls, data: bytes, swarm: SwarmId) -> "Revocations":
        """Read a list, from whomever.

        Args:
            data: The bytes.
            swarm: Whose list it must be.

        Raises:
            RemoteProtocolError: If it is none, or the swarm's key did not sign it.
        """
        try:
            found = msgspec.msgpack.decode(data, type=cls)
        except _DECODE_ERRORS as error:
            raise RemoteProtocolError(f"{len(data)} bytes are no list of revoked invites: {error}") from error
        if found.swarm != swarm or not verify(PeerId(swarm), found._signed_bytes(), found.signature):
            raise RemoteProtocolError("a list of revoked invites is not signed by the swarm's key")
        return found

    def encode(self) -> bytes:
        """Turn the list into bytes."""
        return _ENCODER.encode(self)

    def _signed_bytes(self) -> bytes:
        return _LIST_CONTEXT + _ENCODER.encode((self.swarm, self.number, sorted(self.invites.items())))


class Membership:
    """One peer's place in a private swarm.

    Args:
        invite: By which it came.
        peer: Its own id.
        path: The file that remembers the list of revoked invites between two runs; ``None`` to remember none.
        now: Gives the time, in seconds since 1970.

    Attributes:
        invite: As above.
        proof: What it shows to others.
        revoked: The newest list of revoked invites, as it came; ``None`` before one was heard.
        changed: Set when a newer list was heard; another one is here then.

    Raises:
        NotAMember: If the invite has expired or is known to be revoked.
    """

    def __init__(
        self, invite: Invite, peer: PeerId, *, path: Path | None = None, now: Callable[[], float] = time.time
    ) -> None:
        self.invite = invite
        self._path = path
        self._now = now
        signature = invite.identity.sign(_PEER_CONTEXT + peer.encode())
        self.proof: Final = _ENCODER.encode(_Proof(invite.grant, signature))
        self.revoked: bytes | None = None
        self._revocations: Revocations | None = None
        self.changed = anyio.Event()
        self._read = lru_cache(_REMEMBERED_PROOFS)(self._read_proof)  # two signatures take 0.2 ms
        self._load()
        self.check_own()

    def __repr__(self) -> str:
        return f"Membership({self.invite})"

    @property
    def swarm(self) -> SwarmId:
        """Which swarm it is."""
        return self.invite.grant.swarm

    @property
    def number(self) -> int:
        """The number of the newest list of revoked invites that was heard; -1 before one was."""
        return -1 if self._revocations is None else self._revocations.number

    def hear(self, revoked: bytes) -> bool:
        """Take a list of revoked invites into account if it is newer; say whether it was.

        Raises:
            RemoteProtocolError: If it is none of this swarm's.
        """
        found = Revocations.decode(revoked, self.swarm)
        if found.number <= self.number:
            return False
        self._revocations, self.revoked = found, revoked
        self.changed.set()
        self.changed = anyio.Event()
        return True

    def save(self) -> None:
        """Write the list of revoked invites down. Blocks on the disk; that it cannot be written is logged."""
        if self._path is None or self.revoked is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            draft = self._path.with_name(f".{self._path.name}.{secrets.token_hex(8)}")
            draft.write_bytes(self.revoked)
            draft.replace(self._path)
        except OSError as error:
            _LOG.warning("the list of revoked invites could not be written to %s: %s", self._path, error)

    def _load(self) -> None:
        if self._path is None or not self._path.exists():
            return
        try:
            self.hear(self._path.read_bytes())
        except (OSError, RemoteProtocolError) as error:
            _LOG.warning("the list of revoked invites in %s cannot be read and is ignored: %s", self._path, error)

    def judge(self, peer: PeerId, proof: bytes) -> Grant | str:
        """Say what a peer may do in the swarm, or why it is none of its members.

        Args:
            peer: Whose id the transport has checked.
            proof: What it showed.
        """
        grant = self._read(peer, proof)
        return grant if isinstance(grant, str) else self.fault_of(grant) or grant

    def fault_of(self, grant: Grant) -> str | None:
        """Say why a grant of this swarm does not hold now; ``None`` if it does."""
        if self._revocations is not None and grant.invite in self._revocations.invites:
            return f"invite {grant.invite[:8]} was revoked"
        if grant.expires_s is not None and grant.has_expired(self._now()):
            now = describe_time(self._now())
            return f"invite {grant.invite[:8]} expired on {describe_time(grant.expires_s)}, and it is {now} here"
        return None

    def has_invited(self, peer: PeerId, proof: bytes) -> bool:
        """Say whether a peer has come by an invite to this swarm, be it over or not."""
        return not isinstance(self._read(peer, proof), str)

    def check_own(self) -> None:
        """Check that this peer's own invite still holds.

        Raises:
            NotAMember: If it has expired or was revoked.
        """
        if fault := self.fault_of(self.invite.grant):
            raise NotAMember(f"not a member of swarm {self.swarm[:8]} any more: {fault}; ask its owner for another")

    def check_may_serve(self) -> None:
        """Check that this peer itself may announce a server.

        Raises:
            NotAMember: If its invite is for using only.
        """
        grant = self.invite.grant
        if not grant.allows_serving:
            raise NotAMember(
                f"invite {grant.invite[:8]} allows using the swarm and not serving; ask its owner for one for both"
            )

    def require(self, peer: PeerId, proof: bytes) -> Grant:
        """Take a peer for a member.

        Raises:
            PeerStranger: If it is none.
        """
        grant = self.judge(peer, proof)
        if isinstance(grant, str):
            raise PeerStranger(f"peer {peer[:8]} is no member of swarm {self.swarm[:8]}: {grant}", peer=peer)
        return grant

    def admits(self, announcement: Claim) -> bool:
        """Say whether an announcement is that of a member who may serve."""
        grant = self.judge(announcement.peer, announcement.membership)
        return not isinstance(grant, str) and grant.allows_serving

    def _read_proof(self, peer: PeerId, proof: bytes) -> Grant | str:
        """Check what never changes: that it is a proof, of this peer, for this swarm."""
        if not proof or len(proof) > MAX_PROOF_BYTES:
            return "it showed no invite"
        try:
            shown = msgspec.msgpack.decode(proof, type=_Proof)
        except _DECODE_ERRORS:
            return "what it showed cannot be read; perhaps it runs another version"
        if shown.grant.swarm != self.swarm:
            return "its invite is for another swarm"
        is_signed = verify(PeerId(shown.grant.invite), _PEER_CONTEXT + peer.encode(), shown.signature)
        if not (is_signed and shown.grant.is_genuine):
            return "its proof of membership is forged"
        return shown.grant

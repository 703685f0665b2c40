"""Invites to a private swarm: one line of text by which its owner lets others in. Knows no socket and no clock.

An invite holds a key of its own, which the swarm's key has signed together with what it allows and until when: the
*grant*. With that key, whoever holds the line signs the id of any peer of theirs, on their own machine; the two
signatures are the peer's proof of membership (``members/membership.py``). So nobody has to be asked when a peer joins,
and to revoke one invite cuts off all peers that came by it.
"""

import base64
import hashlib
import secrets
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final, Literal, NewType

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec import Meta

from corolla.errors import ConfigError, UsageError
from corolla.swarm.address import parse_address
from corolla.swarm.identity import Identity, verify
from corolla.terms import PEER_ID_PATTERN, Address, PeerId

__all__ = ["CLOCK_TOLERANCE_S", "Grant", "Invite", "InviteId", "Permission", "SwarmId", "describe_time"]

SwarmId = NewType("SwarmId", str)
"""What a private swarm is: the public half of its key, written like a peer id."""

InviteId = NewType("InviteId", str)
"""What an invite is: the public half of its key, written like a peer id."""

Permission = Literal["serve", "use", "both"]
"""What an invite allows: to announce a server, to have servers compute, or both."""

CLOCK_TOLERANCE_S: Final = 300.0
"""For how long after its end a grant still holds, because the clocks of home computers are wrong by minutes."""

PREFIX: Final = "corolla-invite:"
_MAX_LINE: Final = 2048  # characters
_MAX_PEERS: Final = 8
_CHECKSUM_BYTES: Final = 4  # against a slip in copying; the signature is what nobody can forge
_CONTEXT: Final = b"corolla grant 1\0"
_ENCODER: Final = msgspec.msgpack.Encoder()

_SwarmId = Annotated[SwarmId, Meta(pattern=PEER_ID_PATTERN)]
_InviteId = Annotated[InviteId, Meta(pattern=PEER_ID_PATTERN)]
_Signature = Annotated[bytes, Meta(min_length=64, max_length=64)]
_Time = Annotated[int, Meta(ge=0, le=253402300799)]  # up to the year 9999


class Grant(msgspec.Struct, frozen=True, array_like=True):
    """What the key of a swarm allows whoever holds the key of an invite.

    Args:
        swarm: The swarm.
        invite: The invite.
        allows: What its holders may do.
        expires_s: Until when, in seconds since 1970 in UTC; ``None`` for ever.
        signature: By the swarm's key, over all the others.
    """

    swarm: _SwarmId
    invite: _InviteId
    allows: Permission
    expires_s: _Time | None
    signature: _Signature

    @classmethod
    def issue(cls, key: Identity, invite: InviteId, allows: Permission, expires_s: int | None) -> "Grant":
        """Sign a grant.

        Args:
            key: The swarm's.
            invite: To which invite.
            allows: What its holders may do.
            expires_s: Until when, in seconds since 1970; ``None`` for ever.
        """
        unsigned = cls(SwarmId(key.peer_id), invite, allows, expires_s, bytes(64))
        return msgspec.structs.replace(unsigned, signature=key.sign(unsigned._signed_bytes()))

    @property
    def is_genuine(self) -> bool:
        """Whether the swarm's key signed it."""
        return verify(PeerId(self.swarm), self._signed_bytes(), self.signature)

    @property
    def allows_serving(self) -> bool:
        """Whether its holders may announce servers."""
        return self.allows != "use"

    @property
    def allows_use(self) -> bool:
        """Whether its holders may have servers compute."""
        return self.allows != "serve"

    def has_expired(self, now_s: float) -> bool:
        """Say whether it is over, with some tolerance for wrong clocks.

        Args:
            now_s: Seconds since 1970.
        """
        return self.expires_s is not None and now_s > self.expires_s + CLOCK_TOLERANCE_S

    def _signed_bytes(self) -> bytes:
        return _CONTEXT + _ENCODER.encode((self.swarm, self.invite, self.allows, self.expires_s))


class Invite(msgspec.Struct, frozen=True):
    """An invite as its holder has it: whoever reads it may use it, so it is kept like a password.

    Args:
        version: Of this layout.
        grant: What it allows.
        seed: The invite's private key.
        peers: Addresses of peers to start from.
    """

    version: Literal[1]
    grant: Grant
    seed: bytes
    peers: tuple[Address, ...] = ()

    def __repr__(self) -> str:
        return f"Invite({self.grant.invite[:8]} to swarm {self.grant.swarm[:8]})"  # without the seed

    @classmethod
    def issue(
        cls, key: Identity, *, allows: Permission = "both", expires_s: int | None = None, peers: tuple[str, ...] = ()
    ) -> "Invite":
        """Make an invite.

        Args:
            key: The swarm's.
            allows: What its holders may do.
            expires_s: Until when, in seconds since 1970; ``None`` for ever.
            peers: Addresses of peers to start from.

        Raises:
            ConfigError: If there are too many addresses, or one is none.
        """
        if len(peers) > _MAX_PEERS:
            raise ConfigError(f"an invite holds up to {_MAX_PEERS} addresses, not {len(peers)}; name fewer peers")
        seed = secrets.token_bytes(32)
        grant = Grant.issue(key, InviteId(_identity(seed).peer_id), allows, expires_s)
        return cls(1, grant, seed, tuple(parse_address(peer)[1] for peer in peers))

    @classmethod
    def read(cls, text: str) -> "Invite":
        """Read an invite, or the file that holds one. May read a small file.

        Args:
            text: The line as its owner printed it, or the path of a file with it.

        Raises:
            UsageError: If it is no genuine invite; says what is wrong with it.
        """
        text = text.strip()
        if not text.startswith(PREFIX):
            try:
                with Path(text).expanduser().open(encoding="utf-8") as file:
                    text = file.read(_MAX_LINE + 1).strip()
            except (OSError, ValueError, RuntimeError) as error:
                raise UsageError(
                    f"{text[:64]!r} is neither an invite, which begins with {PREFIX}, nor a file that can be read"
                ) from error
        return cls.parse(text)

    @classmethod
    def parse(cls, line: str) -> "Invite":
        """Read an invite's line.

        Raises:
            UsageError: If it is no genuine invite; says what is wrong with it.
        """
        if not line.startswith(PREFIX):
            raise UsageError(f"an invite begins with {PREFIX}, not with {line[:16]!r}")
        if len(line) > _MAX_LINE:
            raise UsageError(f"the invite has {len(line)} characters and can have {_MAX_LINE}; copy only its line")
        try:
            text = line.removeprefix(PREFIX)
            raw = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        except ValueError:
            raw = b""
        body, checksum = raw[:-_CHECKSUM_BYTES], raw[-_CHECKSUM_BYTES:]
        if checksum != _checksum(body):
            raise UsageError("the invite is not as it was written; copy the whole line again")
        try:
            invite = msgspec.msgpack.decode(body, type=_Line).invite
            for peer in invite.peers:
                parse_address(peer)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OverflowError, ConfigError) as error:
            raise UsageError(f"the invite cannot be read ({error}); it may be of a newer version: upgrade") from error
        if not invite.grant.is_genuine:
            raise UsageError("the invite is not signed by the key of its swarm; ask the swarm's owner for another")
        return invite

    @property
    def line(self) -> str:
        """The invite as text, to be copied."""
        grant = self.grant
        swarm = base64.b32decode(grant.swarm.upper() + "====")
        body = _ENCODER.encode(
            _Line(self.version, swarm, self.seed, grant.allows, grant.expires_s, grant.signature, self.peers)
        )
        return PREFIX + base64.urlsafe_b64encode(body + _checksum(body)).decode().rstrip("=")

    @property
    def identity(self) -> Identity:
        """The invite's own key."""
        return _identity(self.seed)


class _Line(msgspec.Struct, frozen=True, array_like=True):
    """What an invite's line holds: all that the rest can be made of, as it should be short."""

    version: Literal[1]
    swarm: Annotated[bytes, Meta(min_length=32, max_length=32)]
    seed: Annotated[bytes, Meta(min_length=32, max_length=32)]
    allows: Permission
    expires_s: _Time | None
    signature: _Signature
    peers: Annotated[tuple[Annotated[Address, Meta(max_length=256)], ...], Meta(max_length=_MAX_PEERS)]

    @property
    def invite(self) -> Invite:
        swarm = SwarmId(base64.b32encode(self.swarm).decode().rstrip("=").lower())
        own = InviteId(_identity(self.seed).peer_id)
        return Invite(
            self.version, Grant(swarm, own, self.allows, self.expires_s, self.signature), self.seed, self.peers
        )


def describe_time(time_s: float) -> str:
    """Write a time as people read it, in UTC.

    Args:
        time_s: Seconds since 1970.
    """
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _identity(seed: bytes) -> Identity:
    return Identity(Ed25519PrivateKey.from_private_bytes(seed))


def _checksum(body: bytes) -> bytes:
    return hashlib.sha256(body).digest()[:_CHECKSUM_BYTES]

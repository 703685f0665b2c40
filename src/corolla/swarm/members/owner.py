"""What the owner of a private swarm keeps on disk: its key, and which invites were made with it. Knows no network.

One folder a swarm: ``key.pem``, ``number`` (of the last list of revoked invites) and, below ``invites``, a file for
each invite, which holds what the owner wants to remember of it and not its secret. One file each, so that two commands
that run at once lose nothing.
"""

import re
from pathlib import Path
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from corolla.errors import ConfigError, UsageError
from corolla.swarm.identity import Identity
from corolla.swarm.members.invite import Invite, InviteId, Permission, SwarmId
from corolla.swarm.members.membership import Revocations
from corolla.terms import PEER_ID_PATTERN, Address

__all__ = ["Issued", "OwnedSwarm"]

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SHORTEST: Final = 4  # letters by which an invite may be named
_KEPT_S: Final = (
    86400.0  # how long an expired invite stays in the list of revoked ones, for peers whose clocks are slow
)


class Issued(msgspec.Struct, frozen=True, kw_only=True):
    """What is remembered of an invite.

    Args:
        id: Which.
        allows: What its holders may do.
        expires_s: Until when, in seconds since 1970; ``None`` for ever.
        name: For whom it was made, in the owner's words.
        peers: The addresses in it.
        is_revoked: Whether it was revoked.
    """

    id: Annotated[InviteId, Meta(pattern=PEER_ID_PATTERN)]
    allows: Permission
    expires_s: int | None
    name: str = ""
    peers: tuple[Address, ...] = ()
    is_revoked: bool = False


class OwnedSwarm:
    """A private swarm whose key is on this machine.

    Args:
        folder: Where it is kept.
        key: Its key.
    """

    def __init__(self, folder: Path, key: Identity) -> None:
        self._folder = folder
        self._key = key

    def __repr__(self) -> str:
        return f"OwnedSwarm({self.name}, {self.id[:8]})"

    @classmethod
    def create(cls, home: Path, name: str) -> "OwnedSwarm":
        """Make a swarm.

        Args:
            home: The folder of all swarms of this account.
            name: How its owner calls it.

        Raises:
            ConfigError: If the name is taken or no name, or the key cannot be written.
        """
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"{name!r} cannot name a swarm; use up to 64 letters, digits, dots, dashes and underscores"
            )
        folder = home / name
        if (folder / "key.pem").exists():
            raise ConfigError(f"there is a swarm {name!r} already, in {folder}; choose another name")
        return cls(folder, Identity.load_or_create(folder / "key.pem"))

    @classmethod
    def open(cls, home: Path, name: str | None) -> "OwnedSwarm":
        """Find a swarm.

        Args:
            home: The folder of all swarms of this account.
            name: Which; ``None`` for the only one.

        Raises:
            UsageError: If it is not there, or there are several and none is named.
            ConfigError: If its key cannot be read.
        """
        names = cls.names(home)
        if not names:
            raise UsageError("this account owns no swarm; make one with: corolla swarm new")
        if name is None and len(names) > 1:
            raise UsageError(f"this account owns {len(names)} swarms; name one with --swarm: {', '.join(names)}")
        chosen = names[0] if name is None else name
        if chosen not in names:
            raise UsageError(f"this account owns no swarm {chosen!r}; it owns {', '.join(names)}")
        return cls(home / chosen, Identity.load_or_create(home / chosen / "key.pem"))

    @staticmethod
    def names(home: Path) -> list[str]:
        """List the swarms of this account.

        Args:
            home: The folder of all of them.
        """
        return sorted(path.parent.name for path in home.glob("*/key.pem"))

    @property
    def name(self) -> str:
        """How its owner calls it."""
        return self._folder.name

    @property
    def id(self) -> SwarmId:
        """The public half of its key."""
        return SwarmId(self._key.peer_id)

    @property
    def key_path(self) -> Path:
        """The file with its key."""
        return self._folder / "key.pem"

    def invite(
        self,
        *,
        allows: Permission = "both",
        expires_s: int | None = None,
        name: str = "",
        peers: tuple[str, ...] = (),
    ) -> Invite:
        """Make an invite and remember it.

        Args:
            allows: What its holders may do.
            expires_s: Until when, in seconds since 1970; ``None`` for ever.
            name: For whom.
            peers: Addresses of peers to start from.

        Raises:
            ConfigError: If there are too many addresses, or one is none; or it cannot be remembered.
        """
        invite = Invite.issue(self._key, allows=allows, expires_s=expires_s, peers=peers)
        self._remember(
            Issued(id=invite.grant.invite, allows=allows, expires_s=expires_s, name=name, peers=invite.peers)
        )
        return invite

    def own_invite(self, expires_s: int) -> Invite:
        """Make an invite for the owner's own commands, which is not remembered.

        Args:
            expires_s: Until when, in seconds since 1970.
        """
        return Invite.issue(self._key, expires_s=expires_s)

    def issued(self) -> list[Issued]:
        """List the invites that were made, oldest first.

        Raises:
            ConfigError: If a file of them cannot be read.
        """
        found = []
        for path in self._folder.glob("invites/*.json"):
            try:
                found.append((path.stat().st_ctime, msgspec.json.decode(path.read_bytes(), type=Issued)))
            except (OSError, msgspec.DecodeError) as error:
                raise ConfigError(
                    f"{path} cannot be read ({error}); move it away, and its invite is forgotten"
                ) from error
        return [one for _, one in sorted(found, key=lambda item: item[0])]

    def revoke(self, start: str) -> Issued:
        """Revoke an invite; :meth:`revocations` has it from now on.

        Args:
            start: The id of the invite, or enough of its beginning to tell it from others.

        Raises:
            UsageError: If no invite is named so, or several are.
            ConfigError: If it cannot be written down.
        """
        found = [one for one in self.issued() if one.id.startswith(start)] if len(start) >= _SHORTEST else []
        if len(found) != 1:
            raise UsageError(
                f"{len(found) or 'no'} invites of swarm {self.name!r} begin with {start!r}; give {_SHORTEST} letters "
                "or more of one that corolla swarm list shows"
            )
        revoked = msgspec.structs.replace(found[0], is_revoked=True)
        self._remember(revoked)
        return revoked

    def revocations(self, now_s: float) -> Revocations:
        """Sign the list of revoked invites that have not expired anyway, under a number higher than any before.

        Args:
            now_s: Seconds since 1970.

        Raises:
            UsageError: If there are too many.
            ConfigError: If the number cannot be written down.
        """
        listed = {
            one.id: one.expires_s
            for one in self.issued()
            if one.is_revoked and (one.expires_s is None or now_s < one.expires_s + _KEPT_S)
        }
        path = self._folder / "number"
        try:
            before = int(path.read_text()) if path.exists() else 0
            number = max(
                round(now_s * 1000), before + 1
            )  # from the clock, so that a restored backup does not stay behind
            _replace(path, str(number).encode())
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be used: {error}") from error
        return Revocations.issue(self._key, number, listed)

    def _remember(self, issued: Issued) -> None:
        path = self._folder / "invites" / f"{issued.id}.json"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _replace(path, msgspec.json.encode(issued))
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error.strerror or error}") from error


def _replace(path: Path, data: bytes) -> None:
    draft = path.with_name(f".{path.name}.draft")
    draft.write_bytes(data)
    draft.replace(path)

"""Whom to turn to when the directory is empty: peers named by the user, met by chance, or remembered from last time."""

import hashlib
import logging
import secrets
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Final

import msgspec
from anyio import to_thread
from msgspec import Meta

from corolla.errors import BootstrapFailed, ConfigError, Error
from corolla.swarm.address import parse_address, split_address
from corolla.swarm.config import SwarmConfig
from corolla.swarm.endpoint import Endpoint
from corolla.terms import PEER_ID_PATTERN, Address, Announcement, PeerId

__all__ = ["Contact", "Contacts", "cause_of", "contacts_of"]

_LOG = logging.getLogger(__name__)
_MAX_ADDRESSES: Final = 16
_MAX_FILE_BYTES: Final = 1 << 20
_MAX_FILES: Final = 64
"""Swarms whose peers are remembered."""


class Contact(msgspec.Struct, frozen=True):
    """A peer and where it may be found.

    Args:
        peer: Who; ``None`` for whoever is at the address.
        addresses: Where, the likeliest first.
    """

    peer: Annotated[PeerId, Meta(pattern=PEER_ID_PATTERN)] | None
    addresses: Annotated[tuple[Annotated[Address, Meta(max_length=256)], ...], Meta(max_length=_MAX_ADDRESSES)]


class Contacts:
    """The contacts of one peer, on paper and in mind.

    Args:
        bootstrap: Addresses given by the user, with or without a peer id.
        path: The file that remembers peers between two runs; ``None`` to remember none.
        config: The limits.

    Attributes:
        given: Those named by the user.

    Raises:
        ConfigError: If an address is none.
    """

    def __init__(
        self, bootstrap: Sequence[str] = (), *, path: Path | None = None, config: SwarmConfig | None = None
    ) -> None:
        parsed = [parse_address(text) for text in bootstrap]
        self.given = tuple(Contact(peer, (address,)) for peer, address in parsed)
        self._met: dict[PeerId, Contact] = {}
        self._remembered: tuple[Contact, ...] = ()
        self._path = path
        self._max_remembered = (SwarmConfig() if config is None else config).max_remembered

    def all(self) -> list[Contact]:
        """Give all contacts: those named by the user, those met on the way, those remembered."""
        return [*self.given, *self._met.values(), *self._remembered]

    def meet(self, contact: Contact) -> bool:
        """Take in a contact that was found by chance, and say whether it is new.

        Args:
            contact: Who and where; believed as far as a handshake proves it.
        """
        key = contact.peer or PeerId(" ".join(contact.addresses))
        if self._met.get(key) == contact:
            return False
        if len(self._met) >= self._max_remembered:
            del self._met[next(iter(self._met))]
        self._met[key] = contact
        return True

    async def load(self, *, but: PeerId | None = None) -> None:
        """Read the file; one that is missing or damaged costs no more than what it held.

        Args:
            but: Whom to leave out: this peer itself.
        """
        if self._path is None:
            return
        try:
            remembered = await to_thread.run_sync(_read, self._path)
            self._remembered = tuple(contact for contact in remembered if contact.peer != but)
        except FileNotFoundError:
            return
        except (OSError, msgspec.DecodeError, ConfigError) as error:
            _LOG.warning("the remembered peers in %s cannot be read and are ignored: %s", self._path, error)

    async def remember(self, announcements: Iterable[Announcement]) -> None:
        """Write down where peers are, for the next start of this one or another, if that has changed.

        Args:
            announcements: Theirs.
        """
        known = (Contact(claim.peer, claim.addresses) for claim in announcements if claim.addresses)
        chosen = tuple(islice(known, self._max_remembered))
        if self._path is None or not chosen or set(chosen) == set(self._remembered):
            return
        self._remembered = chosen
        try:
            await to_thread.run_sync(_write, self._path, chosen)
        except OSError as error:
            _LOG.warning("the peers could not be written to %s: %s", self._path, error)


def contacts_of(endpoint: Endpoint, given: Sequence[str] = (), *, lasts: bool = False) -> Contacts:
    """Make the contacts of a peer: those that it is given, those in its invite, and those that it remembers.

    What it remembers is of the same swarm: a private one, or that of the same given peers, or else of itself last time.

    Args:
        endpoint: The peer's place in the swarm.
        given: Addresses.
        lasts: Whether its identity is the same at the next start.

    Raises:
        ConfigError: If an address is none.
    """
    config, membership = endpoint.config, endpoint.membership
    names = sorted(given) or ([endpoint.peer_id] if lasts else [])
    if membership is not None:
        names = [membership.swarm]
    path = None
    if config.state is not None and names:
        path = config.state / "peers" / f"{hashlib.sha256(' '.join(names).encode()).hexdigest()[:16]}.json"
    return Contacts([*given, *endpoint.invited_to], path=path, config=config)


def cause_of(failures: Sequence[Error]) -> Error:
    """Say why no contact let this peer in: by its own fault, if one of them said so, or else because none answered.

    Args:
        failures: What went wrong with each.
    """
    for failure in failures:
        if failure.retry == "never":  # not a member, for one
            return failure
    tried = "; ".join(failure.message for failure in failures) or "none has answered yet"
    return BootstrapFailed(
        f"no peer of the swarm could be reached; check the addresses and that one of the peers runs: {tried}"
    )


def _read(path: Path) -> tuple[Contact, ...]:
    with path.open("rb") as file:
        contacts = msgspec.json.decode(file.read(_MAX_FILE_BYTES), type=tuple[Contact, ...])
    for contact in contacts:
        for address in contact.addresses:
            split_address(address)
    return contacts


def _write(path: Path, contacts: tuple[Contact, ...]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")  # other peers of this account may write it as well
    draft.write_bytes(msgspec.json.format(msgspec.json.encode(contacts), indent=1))
    draft.replace(path)
    newest_first = sorted(path.parent.glob("*.json"), key=lambda one: one.stat().st_mtime, reverse=True)
    for forgotten in newest_first[_MAX_FILES:]:
        forgotten.unlink(missing_ok=True)

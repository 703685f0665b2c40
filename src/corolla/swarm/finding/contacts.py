"""Whom to turn to when the directory is empty: peers named by the user, met by chance, or remembered from last time."""

import logging
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Final

import msgspec
from anyio import to_thread
from msgspec import Meta

from corolla.errors import ConfigError
from corolla.swarm.address import parse_address, split_address
from corolla.swarm.config import SwarmConfig
from corolla.terms import PEER_ID_PATTERN, Address, Announcement, PeerId

__all__ = ["Contact", "Contacts"]

_LOG = logging.getLogger(__name__)
_MAX_ADDRESSES: Final = 16
_MAX_FILE_BYTES: Final = 1 << 20


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

    async def load(self) -> None:
        """Read the file; one that is missing or damaged costs no more than what it held."""
        if self._path is None:
            return
        try:
            self._remembered = await to_thread.run_sync(_read, self._path)
        except FileNotFoundError:
            return
        except (OSError, msgspec.DecodeError, ConfigError) as error:
            _LOG.warning("the remembered peers in %s cannot be read and are ignored: %s", self._path, error)

    async def remember(self, announcements: Iterable[Announcement], *, but: PeerId) -> None:
        """Write down where peers are, for the next start, if that has changed.

        Args:
            announcements: Theirs.
            but: Whom to leave out: this peer itself.
        """
        known = (
            Contact(claim.peer, claim.addresses) for claim in announcements if claim.addresses and claim.peer != but
        )
        chosen = tuple(islice(known, self._max_remembered))
        if self._path is None or not chosen or set(chosen) == set(self._remembered):
            return
        self._remembered = chosen
        try:
            await to_thread.run_sync(_write, self._path, chosen)
        except OSError as error:
            _LOG.warning("the peers could not be written to %s: %s", self._path, error)


def _read(path: Path) -> tuple[Contact, ...]:
    with path.open("rb") as file:
        contacts = msgspec.json.decode(file.read(_MAX_FILE_BYTES), type=tuple[Contact, ...])
    for contact in contacts:
        for address in contact.addresses:
            split_address(address)
    return contacts


def _write(path: Path, contacts: tuple[Contact, ...]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.draft")
    draft.write_bytes(msgspec.json.format(msgspec.json.encode(contacts), indent=1))
    draft.replace(path)

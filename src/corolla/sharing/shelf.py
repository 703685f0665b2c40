"""Published adapters in a directory: each in a folder that its id names, whole or not at all, within a quota.

A shelf is the store "a directory", the place of what was pulled from elsewhere, and what a server hands out. Each
folder is an adapter in PEFT's format. Knows the disk; not where adapters come from.
"""

import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from corolla.errors import AdapterNotFound, BadAdapter, CapacityError, UsageError
from corolla.sharing.card import CARD_FILE, MAX_CARD_BYTES, Card, FileName
from corolla.sharing.files import FILES, AdapterFiles, open_files
from corolla.terms import ModelId

__all__ = ["Draft", "Shelf", "find_files", "only_card"]

_MIN_ID_LETTERS: Final = 8
_ID: Final = re.compile(r"[0-9a-f]{64}")
_PART_OF_ID: Final = re.compile(rf"[0-9a-f]{{{_MIN_ID_LETTERS},64}}")


class Shelf:
    """Adapters in a directory. Its methods block on the disk.

    Args:
        directory: Where; made when something is put there.
        quota_bytes: How large all adapters together may be; ``None`` for as large as the disk.
    """

    def __init__(self, directory: Path, quota_bytes: int | None = None) -> None:
        self.directory = directory
        self.quota_bytes = quota_bytes

    def cards(self) -> Iterator[Card]:
        """Give the card of each adapter; what has none that can be read is left out."""
        if not self.directory.is_dir():
            return
        for folder in sorted(self.directory.iterdir()):
            if _ID.fullmatch(folder.name):
                try:
                    yield self._card(folder.name)
                except (BadAdapter, OSError):
                    continue

    def search(self, words: str = "", base: ModelId | None = None) -> list[Card]:
        """Find cards.

        Args:
            words: All of them must be in a card.
            base: The weights that the adapters must be for; ``None`` for any.
        """
        return [card for card in self.cards() if base in (None, card.base) and card.speaks_of(words)]

    def find(self, name: str) -> Card:
        """Find one adapter.

        Args:
            name: Its id, or the first letters of it; its label; or the name that its author gave it.

        Raises:
            AdapterNotFound: If there is none.
            UsageError: If there are several.
        """
        by_id = _PART_OF_ID.fullmatch(name)
        found = [
            card for card in self.cards() if name in (card.name, card.label) or (by_id and card.id.startswith(name))
        ]
        if not found:
            raise AdapterNotFound(f"no adapter goes by {name!r} in {self.directory}; corolla hub search lists them")
        return only_card(found, name)

    def open(self, id: str) -> AdapterFiles:
        """Open an adapter, and check that nothing in it has changed.

        Args:
            id: Its whole id.

        Raises:
            AdapterNotFound: If it is not here.
            BadAdapter: If it is damaged.
        """
        if not self.holds(id):
            raise AdapterNotFound(f"the adapter {id[:12]} is not in {self.directory}")
        files = open_files(self.directory / id)
        if files.card is None or files.card.id != id:
            raise BadAdapter(f"{self.directory / id} holds another adapter than its name says; delete it")
        return files

    def holds(self, id: str) -> bool:
        """Say whether an adapter is here."""
        return _ID.fullmatch(id) is not None and (self.directory / id).is_dir()

    def path_of(self, id: str, file: FileName | None) -> Path:
        """Say where a file of an adapter lies; ``None`` for its card.

        Raises:
            AdapterNotFound: If the adapter is not here.
        """
        if not self.holds(id):
            raise AdapterNotFound(f"the adapter {id[:12]} is not in {self.directory}")
        return self.directory / id / (file or CARD_FILE)

    def check_room(self, card: Card) -> None:
        """Refuse an adapter that there is no room for.

        Raises:
            CapacityError: If there is none.
        """
        used_bytes = sum(one.size_bytes for one in self.cards())
        if self.quota_bytes is not None and used_bytes + card.size_bytes > self.quota_bytes:
            raise CapacityError(
                f"the adapter {card.label} has {card.size_bytes} bytes; of the {self.quota_bytes} lent to adapters in "
                f"{self.directory} {used_bytes} are taken"
            )

    def draft(self, card: Card) -> "Draft":
        """Begin to put an adapter here; use what is given as a context manager.

        Args:
            card: Its card.

        Raises:
            CapacityError: If there is no room for it.
        """
        self.check_room(card)
        return Draft(self, card)

    def put(self, files: AdapterFiles, card: Card) -> AdapterFiles:
        """Copy an adapter here.

        Args:
            files: Where it lies.
            card: Its card, signed.

        Returns:
            The copy.

        Raises:
            BadAdapter: If it is not what the card says.
            CapacityError: If there is no room for it, or it cannot be written.
        """
        if self.holds(card.id):
            return self.open(card.id)
        with self.draft(card) as draft:
            for name in FILES:
                with (files.directory / name).open("rb") as source, (draft.directory / name).open("wb") as copy:
                    shutil.copyfileobj(source, copy)
            return draft.keep()

    def _card(self, id: str) -> Card:
        with (self.directory / id / CARD_FILE).open("rb") as file:
            card = Card.read(file.read(MAX_CARD_BYTES + 1))
        if card.id != id:
            raise BadAdapter(f"{self.directory / id} holds the card of another adapter; delete it")
        return card


class Draft:
    """An adapter that is not whole yet.

    Args:
        shelf: Where it will be.
        card: What it will be.

    Attributes:
        directory: Where to write its files.
    """

    def __init__(self, shelf: Shelf, card: Card) -> None:
        self.card = card
        self.directory = shelf.directory / f".draft-{secrets.token_hex(8)}"
        self._shelf = shelf

    def __enter__(self) -> "Draft":
        try:
            self.directory.mkdir(parents=True)
            (self.directory / CARD_FILE).write_bytes(self.card.encode())
        except OSError as error:
            raise CapacityError(
                f"adapters cannot be kept in {self._shelf.directory}: {error}; make room, or name another directory"
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)

    def keep(self) -> AdapterFiles:
        """Check the adapter, and put it in its place.

        Raises:
            BadAdapter: If it is not what its card says.
            CapacityError: If there is no room for it any more, or it cannot be written.
        """
        open_files(self.directory)
        place = self._shelf.directory / self.card.id
        self._shelf.check_room(self.card)
        try:
            os.replace(self.directory, place)
        except OSError as error:
            if not place.is_dir():  # else somebody else has put it there meanwhile
                raise CapacityError(f"the adapter cannot be put into {place}: {error}") from error
        return self._shelf.open(self.card.id)


def only_card(found: Sequence[Card], name: str) -> Card:
    """Give the card that a name has led to.

    Args:
        found: Those that go by the name, one at least.
        name: The name.

    Raises:
        UsageError: If there are several.
    """
    if len(found) > 1:
        raise UsageError(f"{len(found)} adapters go by {name!r}: {', '.join(card.label for card in found)}; say its id")
    return found[0]


def find_files(name: str, shelf: Shelf) -> AdapterFiles:
    """Find an adapter on this machine.

    Args:
        name: A directory, or what :meth:`Shelf.find` knows.
        shelf: Where those lie that have no directory of their own.

    Raises:
        AdapterNotFound: If there is none.
        BadAdapter: If it is none, or damaged.
        UsageError: If several have that name.
    """
    directory = Path(name).expanduser()
    if directory.is_dir():
        return open_files(directory)
    return shelf.open(shelf.find(name).id)

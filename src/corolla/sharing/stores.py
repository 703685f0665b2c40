"""Where published adapters lie: what all stores can do, and which one a place's name means.

A directory is one (:class:`corolla.sharing.Shelf` does the work), a repository on the Hugging Face hub another, the
servers of a swarm a third. What comes out of any of them is checked against its card before it lies on the own shelf.
"""

from pathlib import Path
from typing import Protocol

from corolla.errors import AdapterNotFound, UsageError
from corolla.hub import HubConfig
from corolla.sharing.card import Card
from corolla.sharing.files import AdapterFiles
from corolla.sharing.huggingface import HuggingFaceStore, is_repository
from corolla.sharing.shelf import Shelf, find_files
from corolla.terms import ModelId

__all__ = ["DirectoryStore", "Store", "bring_files", "open_store"]


class Store(Protocol):
    """A place where adapters are published."""

    def push(self, files: AdapterFiles, card: Card) -> str:
        """Publish an adapter.

        Args:
            files: Where it lies.
            card: Its card, signed.

        Returns:
            Under which name others pull it from there.

        Raises:
            CapacityError: If there is no room for it.
            Error: What else kept it from being published.
        """

    def search(self, words: str, base: ModelId | None) -> list[Card]:
        """Find adapters by words of their cards, all of which must be there, and by the weights that they are for.

        Raises:
            Error: If the place cannot be reached.
        """

    def pull(self, name: str, shelf: Shelf) -> AdapterFiles:
        """Bring an adapter to a shelf of this machine.

        Args:
            name: As :meth:`push` has said, or its id.
            shelf: Where to.

        Raises:
            AdapterNotFound: If it is not there.
            BadAdapter: If it is damaged, forged or unsafe.
            CapacityError: If there is no room for it.
            Error: If the place cannot be reached.
        """


class DirectoryStore:
    """Adapters in a directory, as of a disk that several machines share; see :class:`Store` for what it can do.

    Args:
        directory: Where.
    """

    def __init__(self, directory: Path) -> None:
        self._shelf = Shelf(directory)

    def push(self, files: AdapterFiles, card: Card) -> str:
        """Copy an adapter there."""
        self._shelf.put(files, card)
        return card.id

    def search(self, words: str, base: ModelId | None) -> list[Card]:
        """Look through all cards."""
        return self._shelf.search(words, base)

    def pull(self, name: str, shelf: Shelf) -> AdapterFiles:
        """Copy an adapter from there."""
        card = self._shelf.find(name)
        return shelf.put(self._shelf.open(card.id), card)


def open_store(place: str, hub: HubConfig) -> Store:
    """Open a store that needs no swarm.

    Args:
        place: ``hf`` or ``hf:owner/name`` for the Hugging Face hub, or a directory.
        hub: Where things are kept, and the address of the hub.

    Raises:
        UsageError: If it is no place.
    """
    kind, _, repo = place.partition(":")
    if kind == "hf":
        return HuggingFaceStore(hub, repo or None)
    if not place:
        raise UsageError("the place of a store is empty; name a directory, hf:owner/name, or swarm")
    return DirectoryStore(Path(place).expanduser())


def bring_files(name: str, hub: HubConfig) -> AdapterFiles:
    """Find an adapter, and bring it here if it is elsewhere.

    Args:
        name: A directory; a published adapter of this machine's shelf, by id or name; or ``owner/name``, or
            ``owner/name@revision``, on the Hugging Face hub.
        hub: Where things are kept, and the address of the hub.

    Raises:
        AdapterNotFound: If there is none of that name.
        BadAdapter: If it is none, or damaged, forged or unsafe.
        UsageError: If several have that name.
        CapacityError: If there is no room for it.
        ModelError: If the hub cannot be reached.
    """
    shelf = Shelf(hub.adapters)
    try:
        return find_files(name, shelf)
    except AdapterNotFound:
        if not is_repository(name):
            raise
        return HuggingFaceStore(hub).pull(name, shelf)

"""Published adapters that servers of a swarm hold, for callers who have no event loop."""

from contextlib import AbstractAsyncContextManager
from functools import partial

from corolla.client.sync import Swarm
from corolla.errors import AdapterNotFound, UsageError
from corolla.sharing import AdapterFiles, Card, Shelf, fetch_adapter, only_card, put_adapter, search_adapters
from corolla.swarm import Channel
from corolla.terms import Announcement, Hop, ModelId

__all__ = ["SwarmStore"]

_HOLDERS = 3
"""Servers that are to hold what is pushed; fewer if there are fewer."""


class SwarmStore:
    """The servers of a swarm as a place of adapters; see :class:`corolla.sharing.Store` for what it can do.

    Args:
        swarm: The swarm.
    """

    def __init__(self, swarm: Swarm) -> None:
        self._swarm = swarm

    def push(self, files: AdapterFiles, card: Card) -> str:
        """Put an adapter on the shelves of some servers of its model."""
        servers = [one for one in self._servers() if one.model == card.base]
        if not servers:
            raise UsageError(f"the swarm has no server of {card.base_name}, which {card.label} is for")
        self._swarm.call(put_adapter, self._dial, servers, files, card, _HOLDERS)
        return card.id

    def search(self, words: str, base: ModelId | None) -> list[Card]:
        """Ask servers for the cards on their shelves."""
        return self._swarm.call(search_adapters, self._dial, self._servers(), words, base)

    def pull(self, name: str, shelf: Shelf) -> AdapterFiles:
        """Fetch an adapter from any server that has it."""
        wanted = [card for card in self.search("", None) if name in (card.name, card.label) or card.id.startswith(name)]
        if not name or not wanted:
            raise AdapterNotFound(f"no server of the swarm has an adapter that goes by {name!r}")
        card = only_card(wanted, name)
        if shelf.holds(card.id):
            return shelf.open(card.id)
        return self._swarm.call(partial(fetch_adapter, self._dial, self._servers(), card.id, shelf))

    def _servers(self) -> list[Announcement]:
        return [one for one in self._swarm.snapshot().announcements if one.state == "online"]

    def _dial(self, server: Announcement) -> AbstractAsyncContextManager[Channel]:
        return self._swarm.core.dial(Hop(peer=server.peer, span=server.span, addresses=server.addresses))

"""Adapters that peers of a swarm hold: found, fetched and put there. Whoever is asked need not be trusted."""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Final

import anyio

from corolla.errors import AdapterNotFound, BadAdapter, CapacityError, Error
from corolla.sharing.card import MAX_CARD_BYTES, Card, FileName
from corolla.sharing.files import FILES, AdapterFiles
from corolla.sharing.shelf import Draft, Shelf
from corolla.swarm import Channel
from corolla.telemetry import event, logger
from corolla.terms import Announcement, ModelId
from corolla.wire import Ack
from corolla.wire.shelves import (
    PIECE_BYTES,
    FetchPiece,
    FindAdapters,
    FoundAdapters,
    OfferAdapter,
    Piece,
    PutPiece,
    Wanted,
)

__all__ = ["Dial", "fetch_adapter", "put_adapter", "search_adapters"]

Dial = Callable[[Announcement], AbstractAsyncContextManager[Channel]]
"""Opens a channel to a server."""

_LOG = logger(__name__)
_ANSWER_S: Final = 15.0
_MOST_ASKED: Final = 32
"""Servers that are asked, however many there are."""


async def search_adapters(dial: Dial, servers: Sequence[Announcement], words: str, model: ModelId | None) -> list[Card]:
    """Ask servers for the cards of adapters, all at once.

    Args:
        dial: How to reach them.
        servers: Whom to ask.
        words: Which must all be in a card; or the first letters of an id.
        model: The weights that the adapters must be for; ``None`` for any.

    Returns:
        What any of them has, each once; cards that are forged, or do not match, are left out.
    """
    found: dict[str, Card] = {}

    async def ask(server: Announcement) -> None:
        try:
            async with dial(server) as channel:
                message = FindAdapters(model=model, words=words[:128])
                answer = await channel.request(message, expected=FoundAdapters, deadline_s=_ANSWER_S)
            cards = [Card.read(data) for data in answer.message.cards]
        except Error as error:
            event(_LOG, "peer told of no adapters", peer=server.peer[:8], why=error.message)
            return
        found.update((card.id, card) for card in cards if model in (None, card.base) and card.speaks_of(words))

    async with anyio.create_task_group() as tasks:
        for server in servers[:_MOST_ASKED]:
            tasks.start_soon(ask, server)
    return sorted(found.values(), key=lambda card: (card.name, card.id))


async def fetch_adapter(dial: Dial, servers: Sequence[Announcement], id: str, shelf: Shelf) -> AdapterFiles:
    """Fetch an adapter from whoever has it. A peer that hands out something else is left for the next one.

    Args:
        dial: How to reach servers.
        servers: Whom to ask, one after another.
        id: Its whole id.
        shelf: Where to put it.

    Raises:
        AdapterNotFound: If nobody has it, whole; says what each has answered.
        CapacityError: If there is no room for it here.
    """
    refusals = []
    for server in servers[:_MOST_ASKED]:
        try:
            async with dial(server) as channel:
                card = Card.read(await _fetch(channel, id, None, MAX_CARD_BYTES))
                if card.id != id:
                    raise BadAdapter(f"it handed out the card of {card.id[:12]}")
                draft = await anyio.to_thread.run_sync(shelf.draft, card)
                with draft:
                    for name in FILES:
                        await _fetch_file(channel, draft, name)
                    return await anyio.to_thread.run_sync(draft.keep)
        except CapacityError as error:
            if error.peer is None:
                raise
            refusals.append(f"{server.peer[:8]}: {error.message}")
        except Error as error:
            refusals.append(f"{server.peer[:8]}: {error.message}")
    said = "; ".join(refusals) or "there are no servers"
    raise AdapterNotFound(f"none of {len(refusals)} servers has the adapter {id[:12]}: {said}")


async def put_adapter(
    dial: Dial, servers: Sequence[Announcement], files: AdapterFiles, card: Card, wanted: int
) -> list[str]:
    """Have servers hold an adapter.

    Args:
        dial: How to reach them.
        servers: Who may hold it; they are asked one after another.
        files: Where it lies.
        card: Its card.
        wanted: How many of them should hold it.

    Returns:
        The peer ids of those who do now.

    Raises:
        CapacityError: If none of them does; says what each has answered.
    """
    holders, refusals = list[str](), list[str]()
    for server in servers[:_MOST_ASKED]:
        try:
            async with dial(server) as channel:
                await _put(channel, files, card)
        except Error as error:
            refusals.append(f"{server.peer[:8]}: {error.message}")
        else:
            holders.append(server.peer)
            if len(holders) >= wanted:
                break
    if not holders:
        said = "; ".join(refusals) or "there are no servers of its model"
        raise CapacityError(f"no server took the adapter {card.label}: {said}")
    return holders


async def _put(channel: Channel, files: AdapterFiles, card: Card) -> None:
    answer = await channel.request(OfferAdapter(card=card.encode()), expected=Wanted, deadline_s=_ANSWER_S)
    if not answer.message.is_wanted:
        return
    for name in FILES:
        with (files.directory / name).open("rb") as file:
            while piece := await anyio.to_thread.run_sync(file.read, PIECE_BYTES):
                await channel.request(PutPiece(file=name), [piece], expected=Ack, deadline_s=4 * _ANSWER_S)


async def _fetch_file(channel: Channel, draft: Draft, name: FileName) -> None:
    """Fetch a file, and no more of it than was signed."""
    entry = draft.card.files[name]
    digest, done = hashlib.sha256(), 0
    with (draft.directory / name).open("wb") as file:
        while done < entry.size_bytes:
            piece = await _fetch(channel, draft.card.id, name, entry.size_bytes - done, done)
            if not piece:
                break
            digest.update(piece)
            done += len(piece)
            await anyio.to_thread.run_sync(file.write, piece)
    draft.card.check_file(name, done, digest.hexdigest())


async def _fetch(channel: Channel, id: str, name: FileName | None, limit: int, start: int = 0) -> bytes:
    message = FetchPiece(adapter=id, file=name, start=start)
    answer = await channel.request(message, expected=Piece, deadline_s=4 * _ANSWER_S)
    if len(answer.payload) > limit:
        raise BadAdapter(f"it handed out {len(answer.payload)} bytes, where {limit} at most were due")
    return bytes(answer.payload)

"""What a server's shelf answers: it finds cards, hands out pieces, and takes what fits and there is room for."""

from collections.abc import Callable
from typing import BinaryIO, Final

import anyio

from corolla.errors import AdapterNotFound, CapacityError, Error, PeerBusy, RemoteProtocolError, WrongBase
from corolla.sharing.card import Card
from corolla.sharing.files import FILES
from corolla.sharing.shelf import Draft, Shelf
from corolla.swarm import Channel, check_may_use
from corolla.telemetry import event, logger
from corolla.terms import ModelId, PeerId
from corolla.wire import Ack, Failure
from corolla.wire.limits import MAX_MESSAGE_BYTES
from corolla.wire.shelves import (
    MAX_FOUND,
    PIECE_BYTES,
    FetchPiece,
    FindAdapters,
    FoundAdapters,
    OfferAdapter,
    Piece,
    PutPiece,
    ShelfMessage,
    Wanted,
)

__all__ = ["ServedShelf"]

_LOG = logger(__name__)
_PUT_S: Final = 30.0
"""How long the next piece of an adapter may take to come."""
_AT_ONCE: Final = 4
"""Adapters that are being put here at a time, each by another peer."""


class ServedShelf:
    """Answers what peers ask of a shelf. Its methods belong to the event loop.

    Args:
        shelf: The shelf; nothing is put on one whose quota is 0.
        model: Says which weights adapters must be for to be taken; ``None`` as long as nobody knows.
    """

    def __init__(self, shelf: Shelf, model: Callable[[], ModelId | None]) -> None:
        self._shelf = shelf
        self._model = model
        self._putting: set[PeerId] = set()

    async def handle(self, channel: Channel, message: ShelfMessage) -> None:
        """Answer a message of another peer.

        Args:
            channel: Where it came from.
            message: What was said.

        Raises:
            PeerLost: If the stream broke.
            WireError: If the other side broke the protocol.
        """
        try:
            check_may_use(channel)
            match message:
                case FindAdapters():
                    await channel.send(await anyio.to_thread.run_sync(self._find, message))
                case FetchPiece():
                    await channel.send(Piece(), [await anyio.to_thread.run_sync(self._read, message)])
                case OfferAdapter():
                    await self._take(channel, message)
                case _:
                    raise RemoteProtocolError(f"{type(message).__name__} does not begin a conversation about adapters")
        except Error as error:
            if isinstance(error, RemoteProtocolError):
                raise
            await channel.send(Failure.of(error))

    def _find(self, message: FindAdapters) -> FoundAdapters:
        cards = self._shelf.search(message.words, message.model)
        found, size_bytes = list[bytes](), 0
        for card in cards[:MAX_FOUND]:
            found.append(card.encode())
            size_bytes += len(found[-1])
        return FoundAdapters(cards=tuple(found) if size_bytes < MAX_MESSAGE_BYTES else ())

    def _read(self, message: FetchPiece) -> bytes:
        path = self._shelf.path_of(message.adapter, message.file)
        try:
            with path.open("rb") as file:
                file.seek(message.start)
                return file.read(PIECE_BYTES)
        except (OSError, OverflowError) as error:
            raise AdapterNotFound(f"the adapter {message.adapter[:12]} is not here, or not any more") from error

    async def _take(self, channel: Channel, offer: OfferAdapter) -> None:
        card = Card.read(offer.card)
        if self._shelf.holds(card.id):
            await channel.send(Wanted(is_wanted=False))
            return
        model = self._model()
        if not self._shelf.quota_bytes:
            raise CapacityError("this server keeps no adapters of others; ask another one")
        if card.base != model:
            raise WrongBase(f"the adapter {card.label} is for {card.base[:12]}; this server serves {model or '-':.12}")
        if channel.peer in self._putting or len(self._putting) >= _AT_ONCE:
            raise PeerBusy("other adapters are being put here; try again", retry_after_s=5.0)
        self._putting.add(channel.peer)
        try:
            draft = await anyio.to_thread.run_sync(self._shelf.draft, card)
            with draft:
                await channel.send(Wanted(is_wanted=True))
                await self._receive(channel, draft)
        finally:
            self._putting.discard(channel.peer)
        event(_LOG, "adapter kept", adapter=card.label, size_bytes=card.size_bytes, peer=channel.peer[:8])

    async def _receive(self, channel: Channel, draft: Draft) -> None:
        sizes = {name: entry.size_bytes for name, entry in draft.card.files.items()}
        for name in FILES:
            with (draft.directory / name).open("wb") as file:
                while left := sizes[name] - file.tell():
                    received = await channel.receive(deadline_s=_PUT_S)
                    piece, payload = received.message, received.payload
                    if not isinstance(piece, PutPiece) or piece.file != name or not 0 < len(payload) <= left:
                        raise RemoteProtocolError(f"a piece of {name} was due, of 1 to {left} bytes")
                    await anyio.to_thread.run_sync(_write, file, payload)
                    if name != FILES[-1] or len(payload) < left:
                        await channel.send(Ack())
        await anyio.to_thread.run_sync(draft.keep)
        await channel.send(Ack())


def _write(file: BinaryIO, payload: memoryview) -> None:
    file.write(payload)

"""How published adapters travel: found by their cards, fetched and put in pieces.

An adapter is named by the hash of its card, and the card has the hashes of its files; so whoever fetches one needs to
trust nobody on the way.
"""

from typing import Annotated, Literal

from msgspec import Meta

from corolla.wire.parts import CheckedModelId, Count
from corolla.wire.root import Message

__all__ = [
    "MAX_FOUND",
    "PIECE_BYTES",
    "SHELF_MESSAGES",
    "AdapterId",
    "FetchPiece",
    "FindAdapters",
    "FoundAdapters",
    "OfferAdapter",
    "Piece",
    "PutPiece",
    "ShelfMessage",
    "Wanted",
]

MAX_FOUND = 32
"""Cards in one answer."""

PIECE_BYTES = 1 << 20
"""How much of a file travels at once, at most."""

AdapterId = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
_Card = Annotated[bytes, Meta(max_length=16 << 10)]
_File = Literal["adapter_config.json", "adapter_model.safetensors"]


class ShelfMessage(Message, frozen=True):
    """The root of all that is said of published adapters."""


class FindAdapters(ShelfMessage, frozen=True, tag=True):
    """Asks for the cards of published adapters; answered by :class:`FoundAdapters`.

    Args:
        model: The weights that they must be for; ``None`` for any.
        words: Which must all be in a card; or the first letters of an id.
    """

    model: CheckedModelId | None = None
    words: Annotated[str, Meta(max_length=128)] = ""


class FoundAdapters(ShelfMessage, frozen=True, tag=True):
    """Answers :class:`FindAdapters`: the cards as they were signed."""

    cards: Annotated[tuple[_Card, ...], Meta(max_length=MAX_FOUND)]


class FetchPiece(ShelfMessage, frozen=True, tag=True):
    """Asks for a piece of a file; answered by :class:`Piece`.

    Args:
        adapter: Whose file.
        file: Which; ``None`` for the card.
        start: From which byte on.
    """

    adapter: AdapterId
    file: _File | None = None
    start: Count = 0


class Piece(ShelfMessage, frozen=True, tag=True):
    """Answers :class:`FetchPiece`; the payload is the piece, empty only at the end of the file."""


class OfferAdapter(ShelfMessage, frozen=True, tag=True):
    """Offers to put an adapter on a peer's shelf; answered by :class:`Wanted`.

    If it is wanted, its files follow on the same stream, each from its first byte on, by :class:`PutPiece`, in order of
    their names.

    Args:
        card: Its card.
    """

    card: _Card


class Wanted(ShelfMessage, frozen=True, tag=True):
    """Answers :class:`OfferAdapter`.

    Args:
        is_wanted: Whether its files are; else they are here already.
    """

    is_wanted: bool


class PutPiece(ShelfMessage, frozen=True, tag=True):
    """The next piece of a file, as payload; answered by ``Ack``: the last of all, once the adapter is kept."""

    file: _File


SHELF_MESSAGES = FindAdapters | FoundAdapters | FetchPiece | Piece | OfferAdapter | Wanted | PutPiece
"""All of them."""

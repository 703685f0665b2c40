"""The keys and values of one row, in every block of a span: what others share of it, and what is its own.

Owns the tensors. Knows neither sessions nor leases: what a row may hold is counted in ``cache/pool.py``.
"""

# H KV heads, T new tokens, L stored tokens, D head width

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, NamedTuple

import torch

from corolla.cache.extents import Extent
from corolla.cache.pool import PAGE_TOKENS, pages_for
from corolla.terms import Span

if TYPE_CHECKING:
    from corolla.cache.content import Content

__all__ = ["Piece", "RowKV"]

Piece = tuple[torch.Tensor, torch.Tensor]
"""Keys and values ``[H, L, D]`` of consecutive tokens in one block."""

_LEAST_SHARED: Final = 256
"""A shorter beginning is copied rather than shared: attending to a second piece costs more than so little memory."""

_LEAST_BACK: Final = 256
"""So many tokens can be taken back at least, whatever windows see."""


class _Past(NamedTuple):
    """A beginning that is shared with other rows, and that nobody writes to any more."""

    start: int
    stop: int
    stored: Mapping[int, Piece]

    def until(self, stop: int) -> "_Past":
        if stop == self.stop:
            return self
        less = stop - self.stop
        cut = {block: (keys[:, :less], values[:, :less]) for block, (keys, values) in self.stored.items()}
        return _Past(self.start, stop, cut)


class RowKV:
    """One row's keys and values. A row is one sequence of tokens; a session has one or more.

    During a step every block appends the same new tokens at ``length``; :meth:`commit` then makes them part of the
    row, so that a step which fails half-way leaves the row as it was.

    Args:
        capacity_tokens: How many tokens it is expected to reach; beyond that, it grows by copying.
        windows: For blocks that see only so many tokens, how many: older ones are let go.

    Attributes:
        length: How many tokens every block has stored.
        shortest: What it can still be taken back to, besides nothing at all: windows have let go of what came before.
        content: What its tokens were computed from, as far as that is known; ``None`` if nobody is to know.
    """

    def __init__(self, capacity_tokens: int = 0, windows: Mapping[int, int] = MappingProxyType({})) -> None:
        self.length = 0
        self.shortest = 0
        self.content: Content | None = None
        self._capacity_tokens = pages_for(capacity_tokens) * PAGE_TOKENS
        self._windows = windows
        self._past: tuple[_Past, ...] = ()
        self._own: dict[int, Extent] = {}
        self._own_start = 0
        self._lent = 0  # one past the last own token that other rows see as well

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the row takes, besides what it shares of others."""
        return sum(extent.nbytes for extent in self._own.values())

    @property
    def capacity_tokens(self) -> int:
        """How many tokens it is expected to reach, in whole pages."""
        return self._capacity_tokens

    @property
    def shared_tokens(self) -> int:
        """How many tokens at its beginning it has of others."""
        return self._own_start

    @property
    def blocks(self) -> frozenset[int]:
        """Which blocks have stored anything."""
        return frozenset(self._own) | (frozenset(self._past[0].stored) if self._past else frozenset())

    def append(self, block: int, key_HTD: torch.Tensor, value_HTD: torch.Tensor) -> tuple[Piece, ...]:
        """Store a block's keys and values of new tokens behind those of the row.

        Args:
            block: Which block they belong to.
            key_HTD: The new keys.
            value_HTD: The new values; their width may differ from the keys'.

        Returns:
            All keys and values of the row in that block, in one piece or several, the new ones last: views, valid
            until the next call. Tokens that a window has let go of are missing in front.
        """
        pieces = self.make_room(block, key_HTD, value_HTD)
        for part_HLD, new_HTD in zip(pieces[-1], (key_HTD, value_HTD), strict=True):
            part_HLD[:, -new_HTD.shape[1] :] = new_HTD
        return pieces

    def make_room(self, block: int, key_HTD: torch.Tensor, value_HTD: torch.Tensor) -> tuple[Piece, ...]:
        """Do what :meth:`append` does, but let the caller write the new ones to the end of the last piece."""
        stop = self.length + key_HTD.shape[1]
        own = self._own.get(block)
        if own is None or own.stop < stop:
            own = self._own[block] = self._roomier(own, key_HTD, value_HTD, stop)
        own.top = max(own.top, stop)
        piece = own.view(self._own_start, stop)
        return (*(past.stored[block] for past in self._past), piece) if self._past else (piece,)

    def begin_with(self, blocks: Span, prefixes: Mapping[int, Piece]) -> None:
        """Store keys and values before the first token.

        Args:
            blocks: The blocks that the row is for.
            prefixes: For each of them, keys and values ``[H, P, D]``.
        """
        for block in blocks.indices:
            self.append(block, *prefixes[block])
        self.commit(prefixes[blocks.start][0].shape[1])

    def commit(self, length: int) -> None:
        """Make the row this long: what was appended up to there stays, anything beyond it is forgotten.

        Args:
            length: Tokens; no more than every block has been given. Less than it has, but for nothing at all, is no
                less than ``shortest``.
        """
        assert length >= self.shortest or not length, f"a row that keeps its windows from {self.shortest} on"
        if not length:
            self.leave()
        elif length < max(self._lent, self._own_start):
            self._part(length)
        kept = pages_for(length) * PAGE_TOKENS
        for block, extent in self._own.items():
            assert length <= extent.stop, f"block {block} has room for fewer than {length} tokens"
            if extent.top > kept:
                extent.trim(kept)
        self.length = length
        if self.content is not None:
            self.content.cut(length)
        if self._windows and not self._lent:
            self._slide()

    def read(self, block: int, start: int, stop: int) -> Piece:
        """Copy some tokens' keys and values in one block ``[H, T, D]``, to the host's memory.

        Args:
            block: Which block.
            stop: One past the last token; no more than the row has.
        """
        assert start < stop <= self.length, f"tokens {start}:{stop} of a row of {self.length} were asked for"
        is_whole = not self.shortest or block not in self._windows
        assert is_whole, f"a row has let go of tokens before {self.shortest}"
        pieces = [past.until(min(stop, past.stop)).stored[block] for past in self._past if past.start < stop]
        if stop > self._own_start:
            pieces.append(self._own[block].view(self._own_start, stop))
        keys_HLD, values_HLD = (torch.cat(parts, 1)[:, start - stop :] for parts in zip(*pieces, strict=True))
        return keys_HLD.to("cpu", copy=True).contiguous(), values_HLD.to("cpu", copy=True).contiguous()

    def fork(self, tokens: int | None = None, capacity_tokens: int = 0) -> "RowKV":
        """Give another row that begins with this one's first tokens.

        A long beginning is shared: whoever takes tokens of it back gets memory of its own. The last part is copied if
        it is short, by itself or beside what comes before it, so that no row has many pieces.

        Args:
            tokens: How many, no less than ``shortest``; ``None`` for all.
            capacity_tokens: How many tokens the other row is expected to reach; 0 for as many as this one.
        """
        tokens = self.length if tokens is None else tokens
        assert self.shortest <= tokens <= self.length, f"a row of {self.length} cannot be shared up to {tokens}"
        twin = RowKV(capacity_tokens or self._capacity_tokens, self._windows)
        twin.length, twin.shortest = tokens, self.shortest
        twin.content = None if self.content is None else self.content.fork(tokens)
        parts = [past.until(min(tokens, past.stop)) for past in self._past if past.start < tokens]
        is_own = tokens > self._own_start
        if is_own:
            views = {block: own.view(own.bottom, tokens) for block, own in self._own.items()}
            parts.append(_Past(self._own_start, tokens, views))
        copied = parts.pop() if parts and _is_short(parts[-1]) else None
        twin._past = (*parts,)
        twin._own_start = copied.start if copied else tokens
        if copied:
            for block, piece in copied.stored.items():
                twin._own[block] = twin._moved(piece, tokens, tokens)
        elif is_own:
            self._lent = max(self._lent, tokens)
        return twin

    def leave(self) -> None:
        """Forget everything, and give back what no other row sees."""
        for extent in self._own.values():
            extent.trim(self._lent)
        self._past, self._own = (), {}
        self.length = self.shortest = self._own_start = self._lent = 0
        if self.content is not None:
            self.content.cut(0)

    def _part(self, length: int) -> None:
        """Come back to fewer tokens than others see of this row, or it of others, without disturbing them."""
        twin = self.fork(length)
        self.leave()
        self._past, self._own, self._own_start, self.shortest = twin._past, twin._own, twin._own_start, twin.shortest
        self.content = twin.content

    def _slide(self) -> None:
        """Let go of what windows have passed, a page at a time; as much again as they see is left to be taken back."""
        for block, tokens in self._windows.items():
            start = (self.length - tokens - max(tokens, _LEAST_BACK)) // PAGE_TOKENS * PAGE_TOKENS
            extent = self._own.get(block)
            if extent is not None and start > extent.bottom:
                extent.drop(start)
                self.shortest = max(self.shortest, start + tokens)

    def _roomier(self, own: Extent | None, key_HTD: torch.Tensor, value_HTD: torch.Tensor, stop: int) -> Extent:
        if own is None:
            # A block that has stored nothing must not be shown memory that nobody has written.
            assert self.length == self._own_start
            return self._extent(key_HTD, value_HTD, self.length, stop)
        return self._moved(own.view(own.bottom, self.length), self.length, stop + stop // 2)

    def _moved(self, piece: Piece, length: int, stop: int) -> Extent:
        """Copy a piece that ends at ``length`` to where there is room up to ``stop``."""
        start = length - piece[0].shape[1]
        extent = self._extent(*piece, start, stop)
        extent.write(start, *piece)
        return extent

    def _extent(self, key_HTD: torch.Tensor, value_HTD: torch.Tensor, start: int, stop: int) -> Extent:
        """Make room from one token to another; where room costs nothing, for all that may come."""
        expected = self._capacity_tokens if key_HTD.device.type == "cpu" else 0
        return Extent(key_HTD, value_HTD, start, pages_for(max(stop, expected) - start) * PAGE_TOKENS)


def _is_short(part: _Past) -> bool:
    return part.stop - part.start < max(_LEAST_SHARED, part.start)

"""The keys and values of one row, in every block of a span, in memory that grows with its tokens.

Owns the tensors. Knows neither sessions nor leases: what a row may hold is counted in ``cache/pool.py``.
"""

# H KV heads, T new tokens, L stored tokens, D head width

from collections.abc import Mapping

import torch

from corolla.cache.pool import PAGE_TOKENS, pages_for
from corolla.terms import Span

__all__ = ["RowKV"]


class RowKV:
    """One row's keys and values. A row is one sequence of tokens; a session has one or more.

    During a step every block appends the same new tokens at ``length``; :meth:`commit` then makes them part of the
    row, so that a step which fails half-way leaves the row as it was.

    Attributes:
        length: How many tokens every block has stored.
    """

    def __init__(self) -> None:
        self.length = 0
        self._stored: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the row takes."""
        return sum(keys.nbytes + values.nbytes for keys, values in self._stored.values())

    @property
    def blocks(self) -> frozenset[int]:
        """Which blocks have stored anything."""
        return frozenset(self._stored)

    def append(self, block: int, key_HTD: torch.Tensor, value_HTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store a block's keys and values of new tokens behind those of the row.

        Args:
            block: Which block they belong to.
            key_HTD: The new keys.
            value_HTD: The new values; their width may differ from the keys'.

        Returns:
            All keys and values of the row in that block ``[H, L, D]``, the new ones last: views, valid until the
            next call.
        """
        stop = self.length + key_HTD.shape[1]
        stored = self._stored.get(block)
        if stored is None or stored[0].shape[1] < stop:
            stored = (
                self._grown(stored and stored[0], key_HTD, stop),
                self._grown(stored and stored[1], value_HTD, stop),
            )
            self._stored[block] = stored
        keys_HLD, values_HLD = stored
        keys_HLD[:, self.length : stop] = key_HTD
        values_HLD[:, self.length : stop] = value_HTD
        return keys_HLD[:, :stop], values_HLD[:, :stop]

    def begin_with(self, blocks: Span, prefixes: Mapping[int, tuple[torch.Tensor, torch.Tensor]]) -> None:
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
            length: Tokens; no more than every block has been given.
        """
        capacity = pages_for(length) * PAGE_TOKENS
        for block, (keys_HLD, values_HLD) in self._stored.items():
            assert length <= keys_HLD.shape[1], f"block {block} has room for fewer than {length} tokens"
            if keys_HLD.shape[1] > capacity:
                self._stored[block] = (keys_HLD[:, :capacity].clone(), values_HLD[:, :capacity].clone())
        self.length = length

    def read(self, block: int, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy some tokens' keys and values in one block ``[H, T, D]``, to the host's memory.

        Args:
            block: Which block.
            start: The first token.
            stop: One past the last token; no more than the row has.
        """
        assert start < stop <= self.length, f"tokens {start}:{stop} of a row of {self.length} were asked for"
        keys_HLD, values_HLD = self._stored[block]
        return (
            keys_HLD[:, start:stop].to("cpu", copy=True).contiguous(),
            values_HLD[:, start:stop].to("cpu", copy=True).contiguous(),
        )

    def fork(self) -> "RowKV":
        """Copy the row, for a beam that goes on from it."""
        twin = RowKV()
        twin.length = self.length
        twin._stored = {block: (keys.clone(), values.clone()) for block, (keys, values) in self._stored.items()}
        return twin

    def _grown(self, stored_HLD: torch.Tensor | None, new_HTD: torch.Tensor, stop: int) -> torch.Tensor:
        # A block that has stored nothing must not be shown memory that nobody has written.
        assert stored_HLD is not None or self.length == 0
        heads, _, width = new_HTD.shape
        grown_HLD = new_HTD.new_empty(heads, pages_for(stop) * PAGE_TOKENS, width)
        if stored_HLD is not None:
            grown_HLD[:, : self.length] = stored_HLD[:, : self.length]
        return grown_HLD

"""Beginnings that rows may share, found by content: those of rows in use, and of rows whose sessions have ended.

What is kept of ended sessions yields to whoever needs its pages. Knows no clock and no session; whoever uses it from
several threads holds a lock.
"""

from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakSet

from corolla.cache.pool import PAGE_TOKENS, pages_for
from corolla.cache.rows import RowKV

__all__ = ["Beginning", "Prefixes"]


class Beginning(NamedTuple):
    """Some tokens that a row begins with."""

    row: RowKV
    tokens: int


class Prefixes:
    """Rows by what they begin with.

    Args:
        limit_pages: How many pages rows of ended sessions may fill.
    """

    def __init__(self, limit_pages: int) -> None:
        self._limit_pages = limit_pages
        self._used: WeakSet[RowKV] = WeakSet()
        self._kept: dict[RowKV, float] = {}  # since when nobody has wanted it; the longest unwanted first
        self.kept_pages = 0

    def watch(self, row: RowKV) -> None:
        """Let a row that is in use be found, for as long as it lives."""
        self._used.add(row)

    def find(self, keys: Sequence[bytes], now_s: float) -> Beginning | None:
        """Find the row that begins with most pages of these keys.

        Args:
            keys: Of the pages wanted, from the first one on.
            now_s: What time it is.
        """
        best: Beginning | None = None
        for row in (*self._used, *self._kept):
            tokens = _common_pages(row, keys) * PAGE_TOKENS
            if tokens >= max(row.shortest, 1) and (best is None or tokens > best.tokens):
                best = Beginning(row, tokens)
        if best is not None and best.row in self._kept:
            del self._kept[best.row]
            self._kept[best.row] = now_s
        return best

    def keep(self, row: RowKV, now_s: float) -> None:
        """Keep a row that is not in use any more, unless another kept one begins with all of it.

        Args:
            row: The row; nobody else changes it from now on.
            now_s: What time it is.
        """
        self._used.discard(row)
        keys = row.content.keys if row.content is not None else []
        pages = pages_for(row.length)
        if not keys or pages > self._limit_pages:
            row.leave()
            return
        for other in [*self._kept]:
            common, others = _common_pages(other, keys), _keys(other)
            if common == len(keys) and other.shortest <= len(keys) * PAGE_TOKENS:
                del self._kept[other]
                self._kept[other] = now_s
                row.leave()
                return
            if common == len(others) and row.shortest <= len(others) * PAGE_TOKENS:
                self._drop(other)
        self._kept[row] = now_s
        self.kept_pages += pages
        self.shrink(self._limit_pages)

    def shrink(self, pages: int) -> None:
        """Let go of what was not wanted for longest, until what is kept fills no more than so many pages."""
        while self.kept_pages > pages:
            self._drop(next(iter(self._kept)))

    def drop_old(self, since_s: float) -> None:
        """Let go of what nobody has wanted since then."""
        for row in [row for row, wanted_s in self._kept.items() if wanted_s < since_s]:
            self._drop(row)

    def check_integrity(self) -> None:
        """Verify that all that is kept is counted, within the limit, and can be found.

        Raises:
            AssertionError: If not: a bug in Corolla.
        """
        counted = sum(pages_for(row.length) for row in self._kept)
        assert counted == self.kept_pages, f"{counted} pages are kept, but {self.kept_pages} counted"
        assert self.kept_pages <= self._limit_pages, f"{self.kept_pages} pages are kept of {self._limit_pages}"
        assert not self._kept.keys() & set(self._used), "a row is kept that is in use"
        assert all(0 < len(_keys(row)) <= row.length // PAGE_TOKENS for row in self._kept)

    def _drop(self, row: RowKV) -> None:
        del self._kept[row]
        self.kept_pages -= pages_for(row.length)
        row.leave()


def _keys(row: RowKV) -> Sequence[bytes]:
    return row.content.keys if row.content is not None else ()


def _common_pages(row: RowKV, keys: Sequence[bytes]) -> int:
    """Count the pages with which a row begins as these keys say; as each has all before it in it, by bisection."""
    found = _keys(row)
    if not found or not keys or found[0] != keys[0]:
        return 0
    low, high = 1, min(len(found), len(keys))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if found[middle - 1] == keys[middle - 1] else (low, middle - 1)
    return low

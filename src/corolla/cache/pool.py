"""Who may hold how much KV: pages, leases and admission. Counts only; the tensors are in ``cache/rows.py``.

A page is room for a fixed number of tokens of one row, in every block of the span. A lease is a session's right to
pages: it promises the pages that the session expects to need, and it holds the pages that its rows fill now. Memory
is taken only for what is held; admission counts what is promised, so a session that was let in does not run dry on
its way.
"""

from collections.abc import Sequence

from corolla.errors import CacheFull, PeerBusy, SessionClosed

__all__ = ["PAGE_TOKENS", "Lease", "PagePool", "pages_for"]

PAGE_TOKENS = 64
"""Tokens in a page: the unit of accounts. Memory itself is taken in smaller pieces (``cache/extents.py``)."""


def pages_for(tokens: int) -> int:
    """Count the pages that a row of so many tokens fills."""
    return -(-tokens // PAGE_TOKENS)


class Lease:
    """A session's right to pages. Made by :meth:`PagePool.lease`.

    Attributes:
        promised_pages: What the session said it would need.
        held_pages: What its rows fill now.
        is_open: Whether it has not been released.
    """

    def __init__(self, pool: "PagePool", promised_pages: int) -> None:
        self._pool = pool
        self.promised_pages = promised_pages
        self.held_pages = 0
        self.is_open = True

    @property
    def claim_pages(self) -> int:
        """What the lease takes out of the pool: its promise, or what it holds beyond that."""
        return max(self.promised_pages, self.held_pages)

    @property
    def free_pages(self) -> int:
        """Pages of the whole pool that nobody holds and nobody was promised."""
        return self._pool.free_pages

    def hold(self, lengths: Sequence[int]) -> None:
        """Hold what rows of these lengths fill, more or less than before.

        Args:
            lengths: Tokens in each row.

        Raises:
            SessionClosed: If the lease was released.
            CacheFull: If the pool has too few free pages; the lease is as it was.
        """
        if not self.is_open:
            raise SessionClosed("the session's pages were given back; open another session")
        pages = sum(pages_for(length) for length in lengths)
        missing = pages - self.claim_pages - self._pool.free_pages
        if missing > 0:
            raise CacheFull(
                f"the session needs {pages} KV pages of {PAGE_TOKENS} tokens, {missing} more than are free; "
                "open it with a larger max_tokens elsewhere, or wait for other sessions to end"
            )
        self.held_pages = pages

    def release(self) -> None:
        """Give everything back. Doing it twice does no harm."""
        self.is_open = False
        self.held_pages = 0
        self._pool.forget(self)


class PagePool:
    """All pages that a server lends.

    Args:
        pages: How many there are.
    """

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self._leases: set[Lease] = set()

    @property
    def free_pages(self) -> int:
        """Pages that nobody holds and nobody was promised."""
        return self.pages - sum(lease.claim_pages for lease in self._leases)

    @property
    def free_tokens(self) -> int:
        """Tokens that the free pages have room for."""
        return self.free_pages * PAGE_TOKENS

    @property
    def sessions(self) -> int:
        """How many leases are open."""
        return len(self._leases)

    def lease(self, rows: int, max_tokens: int) -> Lease:
        """Let a session in.

        Args:
            rows: How many rows it has.
            max_tokens: How many tokens each of them is expected to reach.

        Raises:
            CacheFull: If it could not be let in even when nobody else was here.
            PeerBusy: If there is no room for it now.
        """
        pages = rows * pages_for(max_tokens)
        if pages > self.pages:
            raise CacheFull(
                f"{rows} rows of {max_tokens} tokens need {pages} KV pages of {PAGE_TOKENS} tokens; this server has "
                f"{self.pages} in all; ask for fewer tokens or rows"
            )
        if pages > self.free_pages:
            raise PeerBusy(
                f"{rows} rows of {max_tokens} tokens need {pages} KV pages, {self.free_pages} of {self.pages} are free",
                retry_after_s=2.0,
            )
        lease = Lease(self, pages)
        self._leases.add(lease)
        return lease

    def forget(self, lease: Lease) -> None:
        """Take a lease back; :meth:`Lease.release` calls this."""
        self._leases.discard(lease)

    def check_integrity(self) -> None:
        """Verify that free and claimed pages are all pages, and that every claim covers what is held.

        Raises:
            AssertionError: If they are not: a bug in Corolla.
        """
        assert self.free_pages >= 0, f"{-self.free_pages} pages are claimed that do not exist"
        assert self.free_pages + sum(lease.claim_pages for lease in self._leases) == self.pages
        assert all(lease.is_open and 0 <= lease.held_pages <= lease.claim_pages for lease in self._leases)

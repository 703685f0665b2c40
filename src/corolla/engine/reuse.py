"""Steps begin with what is here already: tokens whose like another session has had computed are not computed again.

Who may share is in the root of a row's content, and what decides in the hidden states themselves, so nobody has to be
believed. The compute thread finds beginnings, since it has all rows between two ticks; the event loop keeps rows of
sessions that have ended, and lets go of them.
"""

# N packed tokens, T tokens of a row, D model width, B bytes

import hashlib
import threading
import time
from typing import Final

import torch

from corolla.cache import PAGE_TOKENS, Beginning, Content, Prefixes, RowKV
from corolla.engine.work import Row, SessionRows, StepWork

__all__ = ["Reuse"]

_KEPT_S: Final = 600.0
"""What nobody has wanted for so long is let go of."""
_LEAST_TOKENS: Final = 16
"""Fewer are computed: sessions that by chance say the same would change their rows at the end of each page."""


class Reuse:
    """What rows of an engine may begin with.

    Args:
        limit_pages: How many KV pages rows of ended sessions may fill.
    """

    def __init__(self, limit_pages: int) -> None:
        self._prefixes = Prefixes(limit_pages)
        self._lock = threading.Lock()

    @property
    def lock(self) -> threading.Lock:
        """Held by the event loop while it changes idle rows, which the compute thread may be sharing."""
        return self._lock

    @property
    def kept_pages(self) -> int:
        """How many pages rows of ended sessions fill."""
        return self._prefixes.kept_pages

    def watch(self, rows: tuple[Row, ...], root: bytes) -> None:
        """Let new rows be found, by those who have the same root.

        Args:
            rows: The rows.
            root: What else than hidden states decides what they hold, and who may share it.
        """
        with self._lock:
            for row in rows:
                if isinstance(row, RowKV):
                    row.content = Content(root)
                    self._prefixes.watch(row)

    def begin(self, work: StepWork) -> None:
        """Begin a step, and spare it what is here already; on the compute thread."""
        with self._lock:
            work.begin()
            contents = [row.content if isinstance(row, RowKV) else None for row in work.rows]
            if not any(contents):
                return
            work.digests = _digests(work.hidden_ND)
            first = 0
            for index, (content, start, count) in enumerate(zip(contents, work.starts, work.counts, strict=True)):
                if content is not None and content.tokens != start:
                    work.rows[index].content = None  # it has tokens of which nobody knows what they were
                elif content is not None and count and not work.taps:
                    keys = content.keys_with(work.digests[first : first + count])
                    found = self._find(keys, start)
                    if found is not None:
                        work.take(index, first, self._twin(found, work.rows[index]))
                first += count

    def keep(self, session: SessionRows) -> None:
        """Take a session's pages back, and keep what it holds as far as nobody needs them. Twice does no harm."""
        rows, session.rows = session.rows or (), None
        session.lease.release()
        with self._lock:
            for row in rows:
                if isinstance(row, RowKV) and row.content is not None:
                    self._prefixes.keep(row, time.monotonic())
        self.make_room(session.lease.free_pages)

    def make_room(self, free_pages: int) -> None:
        """Let go of what is kept on pages that somebody needs.

        Args:
            free_pages: How many pages nobody holds and nobody was promised.
        """
        if self._prefixes.kept_pages > free_pages:
            with self._lock:
                self._prefixes.shrink(free_pages)

    def drop_old(self) -> None:
        """Let go of what nobody has wanted for long."""
        with self._lock:
            self._prefixes.drop_old(time.monotonic() - _KEPT_S)

    def check_integrity(self) -> None:
        """Verify what is kept.

        Raises:
            AssertionError: If it is not what is counted: a bug in Corolla.
        """
        with self._lock:
            self._prefixes.check_integrity()

    def _find(self, keys: list[bytes], start: int) -> Beginning | None:
        """Find a beginning that has so much more than what a row has already that it is worth going on from there."""
        least = start + _LEAST_TOKENS
        if len(keys) * PAGE_TOKENS < least:
            return None
        found = self._prefixes.find(keys, time.monotonic())
        return found if found is not None and found.tokens >= least else None

    def _twin(self, found: Beginning, row: Row) -> RowKV:
        assert isinstance(row, RowKV)
        twin = found.row.fork(found.tokens, row.capacity_tokens)
        self._prefixes.watch(twin)
        row.leave()
        return twin


def _digests(hidden_ND: torch.Tensor) -> list[bytes]:
    """Hash each token's hidden state."""
    numbers_NB = hidden_ND.contiguous().view(torch.uint8).numpy()
    return [hashlib.sha256(token_B.data).digest() for token_B in numbers_NB]

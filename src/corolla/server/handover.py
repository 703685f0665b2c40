"""A session leaves one server for another: its keys and values travel, and what it has sent, so that all goes on there.

Rows are read between two steps, a few megabytes at a time, and sent while the next steps are computed. Owns what the
heir has so far; knows nothing of who asked for it.
"""

import asyncio
from collections.abc import Callable

from corolla.codec import decode, encode
from corolla.engine import Engine, SessionRows
from corolla.errors import RemoteProtocolError, UsageError
from corolla.replay import Log, Store
from corolla.server.outlet import FeedTo
from corolla.wire import Buffer, Restore, Restored, Step, split_payload

__all__ = ["Handover", "take_over_rows"]

_PIECE_BYTES = 2 << 20
"""Copied out of the engine at once, between two steps: about a millisecond."""


class Handover:
    """What a leaving server gives its heir of one session.

    Args:
        feed: The stream to the heir.
        engine: Where the session is.
        rows: What it holds there.
        log: What its successor was sent; ``None`` if it has none.
    """

    def __init__(self, feed: FeedTo, engine: Engine, rows: SessionRows, log: Log | None) -> None:
        self.feed = feed
        self._engine = engine
        self._rows = rows
        self._log = log
        self._given: dict[int, int] = {}  # of each row, how many tokens the heir has as they are here

    def note(self, step: Step) -> None:
        """Note that a step was taken: what it rewinds or reorders, the heir does not have any more."""
        for row, start in enumerate(step.starts):
            is_moved = step.order is not None and step.order[row] != row
            self._given[row] = 0 if is_moved else min(self._given.get(row, 0), start)

    async def give(self, resting: asyncio.Lock, taken: Callable[[], int]) -> None:
        """Send what the heir does not have yet, and then say that this is all.

        Args:
            resting: Held by whoever computes a step.
            taken: Says which step was the last.

        Raises:
            UsageError: If the session's family cannot be handed over.
            Error: If the heir cannot be reached, or does not take it in time.
        """
        token_bytes = self._engine.token_bytes(self._rows)
        if not token_bytes:
            raise UsageError("keys and values of this family cannot be handed over")
        limit_tokens = max(1, _PIECE_BYTES // token_bytes)
        while True:
            async with resting:
                piece = self._next_piece(limit_tokens)
                lengths = tuple(row.length for row in self._rows.idle_rows())
                last = Restored(lengths=lengths, number=taken())
            if piece is None:
                await self.feed.give(last)
                return
            await self.feed.give(*piece)

    def _next_piece(self, limit_tokens: int) -> tuple[Restore, list[Buffer]] | None:
        for row, stored in enumerate(self._rows.idle_rows()):
            start = self._given.get(row, 0)
            if start >= stored.length:
                continue
            stop = min(stored.length, start + limit_tokens)
            logged = None if self._log is None else self._log.part(row, start, stop)
            stop = stop if logged is None else start + logged.meta.shape[0]
            encoded = [encode(tensor, "raw") for tensor in self._engine.read(self._rows, row, start, stop)]
            self._given[row] = stop
            restore = Restore(
                row=row,
                start=start,
                tensors=tuple(one.meta for one in encoded),
                logged=None if logged is None else logged.meta,
            )
            return restore, [buffer for one in [*encoded, *([logged] if logged else [])] for buffer in one.buffers]
        return None


def take_over_rows(
    engine: Engine, rows: SessionRows, restore: Restore, payload: memoryview, kept: tuple[Log, Store] | None
) -> None:
    """Take a piece of what a leaving server holds, as its heir.

    Args:
        engine: Where the session is to be.
        rows: What it holds there.
        restore: The piece.
        payload: Its tensors.
        kept: The log of what the session sends, and what keeps the bytes; ``None`` if the client is sent it.

    Raises:
        RemoteProtocolError: If the piece does not fit the session.
        CodecError: If its tensors cannot be read.
        UsageError: If they are not what the engine would have stored.
        CacheFull: If there is no room for them.
    """
    if restore.row >= len(rows.idle_rows()):
        raise RemoteProtocolError(f"row {restore.row} was handed over to a session of {len(rows.idle_rows())}")
    if (restore.logged is None) != (kept is None):
        raise RemoteProtocolError("what was handed over does not fit where the session's outputs go")
    metas = [*restore.tensors, *([restore.logged] if restore.logged else [])]
    parts = split_payload(payload, [meta.nbytes for meta in metas])
    if any(meta.codec != "raw" for meta in restore.tensors):
        raise RemoteProtocolError("keys and values were handed over that a codec has changed")
    tokens = restore.tensors[0].shape[1] if len(restore.tensors[0].shape) == 3 else 0
    if restore.logged is not None and restore.logged.shape != (tokens, engine.span.hidden_size):
        raise RemoteProtocolError(f"{tokens} tokens were handed over with a log of shape {list(restore.logged.shape)}")
    tensors = [decode(meta, part) for meta, part in zip(restore.tensors, parts, strict=False)]
    engine.restore(rows, restore.row, restore.start, tensors)
    if kept is not None and restore.logged is not None:
        log, store = kept
        decode(restore.logged, bytes(parts[-1]))  # it must be readable to whoever is sent it one day
        log.take(restore.row, restore.start, store.keep(restore.logged, [parts[-1]]))

"""What was: samples of each model, what happened, and since when each server is seen. In SQLite, and bounded.

Owns the file and its one connection, which a thread uses at a time. Old samples are thinned out, then forgotten.
"""

import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import anyio
import msgspec

from corolla.errors import ConfigError
from corolla.monitor.changes import Change
from corolla.monitor.picture import Picture
from corolla.terms import ModelId, PeerId

__all__ = ["History", "Sample"]

FINE_S: Final = 86_400
"""For so long every sample is kept."""
COARSE_S: Final = 600
"""Of older ones, one in so many seconds."""
MAX_SAMPLES: Final = 500_000
"""Rows; some 50 MB."""
MAX_POINTS: Final = 720
"""In one answer; more are drawn together."""
MAX_SEEN: Final = 16_384
_SEEN_BREAK_S: Final = 300
"""A monitor that was away for longer does not know whether a server was."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS samples (
    at_s INTEGER, model TEXT, name TEXT, online INTEGER, missing INTEGER, tokens_per_s REAL,
    session_tokens_per_s REAL, free_tokens INTEGER, sessions INTEGER, PRIMARY KEY (model, at_s)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS samples_at ON samples (at_s);
CREATE TABLE IF NOT EXISTS changes (number INTEGER PRIMARY KEY, at_s REAL, said BLOB);
CREATE TABLE IF NOT EXISTS seen (peer TEXT PRIMARY KEY, since_s REAL, last_s REAL) WITHOUT ROWID;
"""


class Sample(msgspec.Struct, frozen=True):
    """How a model was at a time, or on average over a while.

    Args:
        at_s: When, in seconds since 1970.
        online: Servers that took sessions.
        missing: Blocks without one; the most that there were.
        tokens_per_s: Of the weakest block; the least that there was.
        session_tokens_per_s: Of one session.
        free_tokens: KV tokens that there was room for.
        sessions: That there were.
    """

    at_s: float
    online: float
    missing: int
    tokens_per_s: float
    session_tokens_per_s: float | None
    free_tokens: float
    sessions: float


class History:
    """Remembers how a swarm was. Use it as an async context manager.

    Args:
        path: The file; ``None`` to remember only while this lives.
        keep_s: What is older is forgotten.
        max_changes: How many happenings are remembered.
    """

    def __init__(self, path: Path | None, *, keep_s: float, max_changes: int) -> None:
        self._path = path
        self._keep_s = keep_s
        self._max_changes = max_changes
        self._turn = anyio.Lock()
        self._thinned_until_s = 0
        self._database: sqlite3.Connection

    async def __aenter__(self) -> Self:
        """Open the file, or make it.

        Raises:
            ConfigError: If it cannot be used.
        """
        await anyio.to_thread.run_sync(self._open)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with anyio.CancelScope(shield=True):
            async with self._turn:
                await anyio.to_thread.run_sync(self._database.close)

    async def note(self, picture: Picture, since_s: Mapping[PeerId, float]) -> None:
        """Remember how each model is, and since when each server has been seen."""
        async with self._turn:
            await anyio.to_thread.run_sync(self._note, picture, dict(since_s))

    async def add(self, changes: Sequence[Change]) -> None:
        """Remember what happened."""
        async with self._turn:
            await anyio.to_thread.run_sync(self._add, changes)

    async def samples(self, model: ModelId, from_s: float, until_s: float) -> list[Sample]:
        """Give how a model was, in at most ``MAX_POINTS`` points.

        Args:
            model: Which.
            from_s: Since when, in seconds since 1970.
            until_s: Until when.
        """
        async with self._turn:
            return await anyio.to_thread.run_sync(self._samples, model, from_s, until_s)

    async def changes(self, limit: int) -> list[Change]:
        """Give what happened, the newest first.

        Args:
            limit: At most so many.
        """
        async with self._turn:
            return await anyio.to_thread.run_sync(self._changes, limit)

    async def since(self, now_s: float) -> dict[PeerId, float]:
        """Give since when each server was seen that was still there when this monitor ended, if that was just now.

        Args:
            now_s: The time, in seconds since 1970.
        """
        async with self._turn:
            rows = await anyio.to_thread.run_sync(
                self._rows, "SELECT peer, since_s FROM seen WHERE last_s > ?", (now_s - _SEEN_BREAK_S,)
            )
        return {PeerId(str(peer)): float(str(since_s)) for peer, since_s in rows}

    def _open(self) -> None:
        shown = self._path or ":memory:"
        try:
            if self._path is not None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(shown, check_same_thread=False, timeout=10.0)
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = NORMAL")
            self._database.executescript(_SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"the monitor cannot remember anything in {shown}: {error}") from error

    def _note(self, picture: Picture, since_s: dict[PeerId, float]) -> None:
        at_s = int(picture.at_s)
        rows = [
            (
                at_s, one.model, one.name, one.online, one.missing, one.tokens_per_s, one.session_tokens_per_s,
                min(one.free_tokens, 2**62), min(one.sessions, 2**62),
            )
            for one in picture.models
        ]  # fmt: skip
        seen = [(peer, since, picture.at_s) for peer, since in since_s.items()][:MAX_SEEN]
        with self._database as database:
            database.executemany("INSERT OR REPLACE INTO samples VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
            database.execute("DELETE FROM seen")
            database.executemany("INSERT OR REPLACE INTO seen VALUES (?, ?, ?)", seen)
            self._forget(at_s)

    def _forget(self, now_s: int) -> None:
        """Forget what is too old; of what is no longer fine, keep the first sample in each coarse slot."""
        execute = self._database.execute
        execute("DELETE FROM samples WHERE at_s < ?", (now_s - self._keep_s,))
        coarse_until_s = now_s - FINE_S
        execute(
            "DELETE FROM samples WHERE at_s BETWEEN ? AND ? AND EXISTS (SELECT 1 FROM samples AS first WHERE"
            " first.model = samples.model AND first.at_s < samples.at_s"
            " AND first.at_s >= samples.at_s - samples.at_s % ?)",
            (self._thinned_until_s, coarse_until_s, COARSE_S),
        )
        self._thinned_until_s = coarse_until_s - COARSE_S
        (count,) = execute("SELECT count(*) FROM samples").fetchone()
        if count > MAX_SAMPLES:
            execute(
                "DELETE FROM samples WHERE at_s <= (SELECT at_s FROM samples ORDER BY at_s LIMIT 1 OFFSET ?)",
                (count - MAX_SAMPLES,),
            )

    def _add(self, changes: Sequence[Change]) -> None:
        with self._database as database:
            rows = [(change.at_s, msgspec.json.encode(change)) for change in changes]
            database.executemany("INSERT INTO changes (at_s, said) VALUES (?, ?)", rows)
            database.execute(
                "DELETE FROM changes WHERE number <= (SELECT max(number) FROM changes) - ?", (self._max_changes,)
            )

    def _samples(self, model: ModelId, from_s: float, until_s: float) -> list[Sample]:
        step_s = max(1, int((until_s - from_s) / MAX_POINTS) + 1)
        rows = self._rows(
            "SELECT min(at_s), avg(online), max(missing), min(tokens_per_s), avg(session_tokens_per_s),"
            " avg(free_tokens), avg(sessions) FROM samples WHERE model = ? AND at_s BETWEEN ? AND ?"
            " GROUP BY CAST(at_s / ? AS INTEGER) ORDER BY 1 LIMIT ?",
            (model, from_s, until_s, step_s, MAX_POINTS + 1),
        )
        return [msgspec.convert(row, Sample, strict=False, from_attributes=False) for row in map(_named, rows)]

    def _changes(self, limit: int) -> list[Change]:
        rows = self._rows("SELECT said FROM changes ORDER BY number DESC LIMIT ?", (limit,))
        return [msgspec.json.decode(said, type=Change) for (said,) in rows if isinstance(said, bytes)]

    def _rows(self, query: str, values: Sequence[object]) -> list[tuple[object, ...]]:
        with closing(self._database.execute(query, tuple(values))) as cursor:
            return cursor.fetchall()


def _named(row: tuple[object, ...]) -> dict[str, object]:
    return dict(zip(Sample.__struct_fields__, row, strict=True))

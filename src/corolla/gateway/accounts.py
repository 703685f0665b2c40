"""API keys, and what was spent with each: in SQLite, or in a PostgreSQL that several gateways share.

Owns the database. Its functions block, so they belong on threads. A key is 32 random bytes, so a plain hash of it tells
nothing; the key itself is shown once and kept nowhere.
"""

import hashlib
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sql
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, IntegrityError, NoSuchModuleError, ProgrammingError, SQLAlchemyError

from corolla.errors import ConfigError, DatabaseFailed, InvalidKey, QuotaSpent, RateLimited, UsageError
from corolla.gateway.config import KeyConfig

__all__ = ["Account", "Accounts", "NewKey", "Spent"]

_MINUTE_S, _DAY_S = 60, 86400
_BUSY_S = 10.0
_TABLES = sql.MetaData()
_KEYS = sql.Table(
    "corolla_keys",
    _TABLES,
    sql.Column("id", sql.String(16), primary_key=True),
    sql.Column("name", sql.String(200), nullable=False),
    sql.Column("hash", sql.String(64), nullable=False, unique=True),
    sql.Column("made_s", sql.BigInteger, nullable=False),
    sql.Column("revoked_s", sql.BigInteger),
    sql.Column("requests_per_min", sql.BigInteger),
    sql.Column("tokens_per_day", sql.BigInteger),
)
_MINUTES = sql.Table(  # the requests of each key in its latest minute
    "corolla_minutes",
    _TABLES,
    sql.Column("key_id", sql.String(16), primary_key=True),
    sql.Column("minute", sql.BigInteger, nullable=False),
    sql.Column("requests", sql.BigInteger, nullable=False),
)
_DAYS = sql.Table(
    "corolla_days",
    _TABLES,
    sql.Column("key_id", sql.String(16), primary_key=True),
    sql.Column("day", sql.BigInteger, primary_key=True),
    sql.Column("requests", sql.BigInteger, nullable=False),
    sql.Column("read_tokens", sql.BigInteger, nullable=False),
    sql.Column("written_tokens", sql.BigInteger, nullable=False),
)


@dataclass(frozen=True, slots=True)
class Account:
    """Whose request it is.

    Args:
        id: The id of the key.
        name: For whom the key is.
    """

    id: str
    name: str


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key that was just made.

    Args:
        id: By which it is known from now on.
        text: The key itself, which nobody can tell again.
    """

    id: str
    text: str


@dataclass(frozen=True, slots=True)
class Spent:
    """A key and what was spent with it.

    Args:
        id: By which it is known.
        name: For whom it is.
        made_s: When it was made, in seconds since 1970.
        revoked_s: When it was revoked; ``None`` if it holds.
        requests_per_min: Its limit; ``None`` for none.
        tokens_per_day: Its limit; ``None`` for none.
        requests: Answered with it, ever.
        read_tokens: Of prompts, ever.
        written_tokens: Of answers, ever.
    """

    id: str
    name: str
    made_s: int
    revoked_s: int | None
    requests_per_min: int | None
    tokens_per_day: int | None
    requests: int
    read_tokens: int
    written_tokens: int


class Accounts:
    """The keys of a gateway. Any number of threads may use them at once; close them in the end.

    Args:
        database: A URL, or the path of an SQLite file.
        clock_s: Tells the seconds since 1970.

    Raises:
        ConfigError: If the URL means nothing.
        DatabaseFailed: If the database does not answer.
    """

    def __init__(self, database: str | Path, *, clock_s: Callable[[], float] = time.time) -> None:
        self._clock_s = clock_s
        self._engine = _connect(database)
        insert = postgresql.insert if self._engine.dialect.name == "postgresql" else sqlite.insert
        self._insert: Callable[[sql.Table], Any] = insert
        with _answering():
            try:
                _TABLES.create_all(self._engine)
            except (ProgrammingError, IntegrityError):  # another gateway has made them at the same time
                _TABLES.create_all(self._engine)

    def close(self) -> None:
        """Let the database go."""
        self._engine.dispose()

    def is_empty(self) -> bool:
        """Say whether no key was ever made.

        Raises:
            DatabaseFailed: If the database does not answer.
        """
        with _answering(), self._engine.connect() as connection:
            return connection.execute(sql.select(_KEYS.c.id).limit(1)).first() is None

    def make(self, config: KeyConfig) -> NewKey:
        """Make a key.

        Args:
            config: For whom, and what it allows.

        Raises:
            DatabaseFailed: If the database does not answer.
        """
        made = NewKey(secrets.token_hex(4), f"ck-{secrets.token_urlsafe(32)}")
        row = {
            "id": made.id,
            "name": config.name,
            "hash": _hash(made.text),
            "made_s": int(self._clock_s()),
            "requests_per_min": config.requests_per_min,
            "tokens_per_day": config.tokens_per_day,
        }
        with _answering(), self._engine.begin() as connection:
            connection.execute(sql.insert(_KEYS).values(**row))
        return made

    def revoke(self, key_id: str) -> None:
        """Take a key back.

        Args:
            key_id: The id of the key.

        Raises:
            UsageError: If there is none of that id, or it was revoked before.
            DatabaseFailed: If the database does not answer.
        """
        with _answering(), self._engine.begin() as connection:
            held = (_KEYS.c.id == key_id) & _KEYS.c.revoked_s.is_(None)
            done = connection.execute(sql.update(_KEYS).where(held).values(revoked_s=int(self._clock_s())))
        if not done.rowcount:
            raise UsageError(f"no key {key_id!r} is in force; corolla gateway keys list shows those that are")

    def all(self) -> list[Spent]:
        """List all keys, the oldest first.

        Raises:
            DatabaseFailed: If the database does not answer.
        """
        sums = [
            sql.func.coalesce(sql.func.sum(column), 0)
            for column in (_DAYS.c.requests, _DAYS.c.read_tokens, _DAYS.c.written_tokens)
        ]
        shown = (_KEYS.c.id, _KEYS.c.name, _KEYS.c.made_s, _KEYS.c.revoked_s)
        limits = (_KEYS.c.requests_per_min, _KEYS.c.tokens_per_day)
        joined = _KEYS.outerjoin(_DAYS, _DAYS.c.key_id == _KEYS.c.id)
        found = (
            sql.select(*shown, *limits, *sums).select_from(joined).group_by(*shown, *limits).order_by(_KEYS.c.made_s)
        )
        with _answering(), self._engine.connect() as connection:
            return [Spent(*row[:6], *map(int, row[6:])) for row in connection.execute(found)]

    def admit(self, key: str | None) -> Account:
        """Let a request in, and count it.

        Args:
            key: What came as the key.

        Raises:
            InvalidKey: If it is none, or is not in force.
            RateLimited: If it has had its requests of this minute.
            QuotaSpent: If it has had its tokens of this day.
            DatabaseFailed: If the database does not answer.
        """
        if not key:
            raise InvalidKey("no API key was given; send it as: Authorization: Bearer ck-...")
        with _answering(), self._engine.connect() as connection:
            row = connection.execute(sql.select(_KEYS).where(_KEYS.c.hash == _hash(key))).first()
        if row is None or row.revoked_s is not None:
            raise InvalidKey(f"the API key is {'unknown' if row is None else 'revoked'}; ask for another")
        now_s = self._clock_s()
        minute = int(now_s // _MINUTE_S)
        count = self._insert(_MINUTES).values(key_id=row.id, minute=minute, requests=1)
        same = _MINUTES.c.minute == count.excluded.minute
        count = count.on_conflict_do_update(
            index_elements=["key_id"],
            set_={"minute": count.excluded.minute, "requests": sql.case((same, _MINUTES.c.requests + 1), else_=1)},
        ).returning(_MINUTES.c.requests)
        with _answering(), self._engine.begin() as connection:
            requests = connection.execute(count).scalar_one()
            tokens = self._spent_today(connection, row.id, now_s) if row.tokens_per_day is not None else 0
        if row.requests_per_min is not None and requests > row.requests_per_min:
            raise RateLimited(
                f"the API key allows {row.requests_per_min} requests a minute", retry_after_s=_left(now_s, _MINUTE_S)
            )
        if row.tokens_per_day is not None and tokens >= row.tokens_per_day:
            raise QuotaSpent(
                f"the API key allows {row.tokens_per_day} tokens a day, and {tokens} were spent",
                retry_after_s=_left(now_s, _DAY_S),
            )
        return Account(row.id, row.name)

    def record(self, account: Account, read_tokens: int, written_tokens: int) -> None:
        """Write down what a request has cost.

        Args:
            account: Whose it was.
            read_tokens: Of its prompts.
            written_tokens: Of its answers.

        Raises:
            DatabaseFailed: If the database does not answer.
        """
        day = int(self._clock_s() // _DAY_S)
        made = {"requests": 1, "read_tokens": read_tokens, "written_tokens": written_tokens}
        count = self._insert(_DAYS).values(key_id=account.id, day=day, **made)
        more = {name: _DAYS.c[name] + count.excluded[name] for name in made}
        with _answering(), self._engine.begin() as connection:
            connection.execute(count.on_conflict_do_update(index_elements=["key_id", "day"], set_=more))

    def _spent_today(self, connection: sql.Connection, key_id: str, now_s: float) -> int:
        today = (_DAYS.c.key_id == key_id) & (_DAYS.c.day == int(now_s // _DAY_S))
        found = connection.execute(sql.select(_DAYS.c.read_tokens + _DAYS.c.written_tokens).where(today)).scalar()
        return int(found or 0)


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _left(now_s: float, period_s: int) -> float:
    return period_s - now_s % period_s


def _connect(database: str | Path) -> sql.Engine:
    """Make the engine; it connects when it is used.

    Raises:
        ConfigError: If the URL means nothing, or its driver is not installed.
    """
    if isinstance(database, Path):
        database.parent.mkdir(parents=True, exist_ok=True)
        url = sql.URL.create("sqlite", database=str(database))
    else:
        try:
            url = sql.make_url(database)
        except ArgumentError as error:
            raise ConfigError(
                "the gateway's database is no URL; one is postgresql://user:password@host/name"
            ) from error
    backend = url.get_backend_name()
    if backend not in ("sqlite", "postgresql"):
        raise ConfigError(f"the gateway's database is of kind {backend}; sqlite and postgresql are possible")
    if backend == "postgresql":
        url = url.set(drivername="postgresql+psycopg")
    options = {"timeout": _BUSY_S} if backend == "sqlite" else {"connect_timeout": int(_BUSY_S)}
    try:
        engine = sql.create_engine(url, connect_args=options, pool_pre_ping=backend != "sqlite")
    except (ModuleNotFoundError, NoSuchModuleError) as error:
        raise ConfigError("PostgreSQL needs its driver; install it with: pip install 'corolla[postgresql]'") from error
    if backend == "sqlite":
        sql.event.listen(engine, "connect", _prepare)
    return engine


def _prepare(connection: Any, _: object) -> None:  # noqa: ANN401 - of sqlite3, through SQLAlchemy
    """Let readers and a writer of an SQLite file work at the same time."""
    connection.execute("pragma journal_mode=wal").close()
    connection.execute("pragma synchronous=normal").close()


@contextmanager
def _answering() -> Iterator[None]:
    try:
        yield
    except SQLAlchemyError as error:
        raise DatabaseFailed(f"the gateway's database does not answer: {type(error).__name__}") from error

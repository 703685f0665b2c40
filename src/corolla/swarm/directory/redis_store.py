"""Redis, or whatever speaks its protocol, as the store of a directory, by the redis package.

Below ``corolla:{<swarm>}:`` are a key for each peer with its record, which goes after half an hour without a new one; a
sorted set of those peers by when they spoke last; and a stream of what is new. What is old is cleared away by whoever
writes next. Knows bytes and times; who may be believed is known to ``directory/directory.py``.
"""

import importlib
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from types import ModuleType
from typing import Final, TypeVar
from urllib.parse import urlsplit

import anyio
import msgspec

from corolla.errors import ConfigError, SwarmError
from corolla.swarm.config import SwarmConfig
from corolla.swarm.directory.store import Reading
from corolla.terms import PeerId
from corolla.wire import Record, Suspicion
from corolla.wire.limits import MAX_RECORD_BYTES, MAX_STAMP_BYTES

__all__ = ["RedisStore"]

_T = TypeVar("_T", bound=msgspec.Struct)
_SCHEMES: Final = ("redis", "rediss")
_KEPT_MS: Final = 1_800_000
_NEWS: Final = 16384  # entries of the stream that are kept
_AT_ONCE: Final = 256  # keys
_MAX_VALUE_BYTES: Final = MAX_RECORD_BYTES + MAX_STAMP_BYTES + 128
_RECORD, _SUSPICION = b"record", b"suspicion"
_ENCODER: Final = msgspec.msgpack.Encoder()
_RECORDS: Final = msgspec.msgpack.Decoder(Record)
_SUSPICIONS: Final = msgspec.msgpack.Decoder(Suspicion)


class RedisStore:
    """A :class:`~corolla.swarm.directory.store.Store` in a Redis.

    Args:
        url: ``redis://[user:password@]host:port[/database]``, or ``rediss://`` for TLS.
        swarm: Which swarm's directory: its id, or a word for a public one.
        config: The limits.

    Raises:
        ConfigError: If the URL is none, or the redis package is not there.
    """

    def __init__(self, url: str, swarm: str, config: SwarmConfig) -> None:
        parts = urlsplit(url)
        if parts.scheme not in _SCHEMES or not parts.hostname:
            raise ConfigError("a directory is kept in a store at redis://host:port/database, or rediss:// for TLS")
        self._place = f"{parts.hostname}:{parts.port or 6379}"
        self._module = _import_redis()
        self._config = config
        self._redis = self._module.Redis.from_url(
            url,
            protocol=2,
            socket_connect_timeout=config.handshake_s,
            socket_timeout=config.heartbeat_s + config.request_s,
            retry=None,
            driver_info=None,
            max_connections=8,
        )
        self._prefix = f"corolla:{{{swarm}}}:"
        self._index, self._stream = f"{self._prefix}peers", f"{self._prefix}news"
        self._ahead_ms = 0.0  # by how much its clock is ahead of this machine's monotonic one

    async def read(self) -> Reading:
        """Read every record that is kept.

        Raises:
            SwarmError: If Redis cannot be reached.
        """
        async with self._asking():
            last = await self._redis.xrevrange(self._stream, count=1)
            second, microsecond = await self._redis.time()
            self._ahead_ms = second * 1000 + microsecond / 1000 - time.monotonic() * 1000
            peers = await self._redis.zrevrange(self._index, 0, self._config.max_peers - 1)
            records: list[Record] = []
            for start in range(0, len(peers), _AT_ONCE):
                records += await self._read_some(peers[start : start + _AT_ONCE])
            return Reading(records, (), last[0][0].decode() if last else "0-0")

    async def news(self, mark: str, wait_s: float) -> Reading:
        """Wait for what is new since a mark, for so long at most.

        Raises:
            SwarmError: If Redis cannot be reached.
        """
        async with self._asking(wait_s):
            found = await self._redis.xread({self._stream: mark}, count=_AT_ONCE, block=max(1, round(wait_s * 1000)))
        entries = found[0][1] if found else []
        now_ms = time.monotonic() * 1000 + self._ahead_ms
        records: list[Record] = []
        suspicions: list[Suspicion] = []
        for entry, fields in entries:
            mark = entry.decode()
            age_s = max(0.0, now_ms - int(mark.partition("-")[0])) / 1000
            records += _decoded(_RECORDS.decode, fields.get(_RECORD), age_s)
            suspicions += _decoded(_SUSPICIONS.decode, fields.get(_SUSPICION))
        return Reading(records, suspicions, mark)

    async def put(self, peer: PeerId, record: Record) -> None:
        """Keep a peer's record instead of its last one, and tell others.

        Raises:
            SwarmError: If Redis cannot be reached.
        """
        value = _ENCODER.encode(record)
        async with self._asking(), self._redis.pipeline(transaction=True) as commands:
            now_ms = round(time.time() * 1000)
            commands.set(self._prefix + peer, value, px=_KEPT_MS)
            commands.zadd(self._index, {peer: now_ms})
            commands.zremrangebyscore(self._index, 0, now_ms - 2 * _KEPT_MS)
            commands.xadd(self._stream, {_RECORD: value}, maxlen=_NEWS)
            await commands.execute()

    async def accuse(self, suspicion: Suspicion) -> None:
        """Tell others of a suspicion.

        Raises:
            SwarmError: If Redis cannot be reached.
        """
        async with self._asking():
            await self._redis.xadd(self._stream, {_SUSPICION: _ENCODER.encode(suspicion)}, maxlen=_NEWS)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._redis.aclose()

    async def _read_some(self, peers: Sequence[bytes]) -> list[Record]:
        async with self._redis.pipeline(transaction=False) as commands:
            for peer in peers:
                key = self._prefix.encode() + peer
                commands.getrange(key, 0, _MAX_VALUE_BYTES)
                commands.pttl(key)
            replies = await commands.execute()
        pairs = zip(replies[::2], replies[1::2], strict=True)
        return [
            record
            for value, left_ms in pairs
            if value
            for record in _decoded(_RECORDS.decode, value, max(0, _KEPT_MS - left_ms) / 1000)
        ]

    @asynccontextmanager
    async def _asking(self, wait_s: float = 0.0) -> AsyncIterator[None]:
        try:
            with anyio.fail_after(wait_s + self._config.handshake_s):
                yield
        except (self._module.RedisError, OSError, TimeoutError) as error:
            raise SwarmError(
                f"the directory's store at {self._place} cannot be used: {error or 'no answer'}; check --directory"
            ) from error


def _import_redis() -> ModuleType:
    try:
        return importlib.import_module("redis.asyncio")
    except ImportError as error:
        raise ConfigError(
            f"a directory in Redis needs the redis package ({error}); pip install 'corolla[redis]', or leave it out"
        ) from error


def _decoded(decode: Callable[[bytes], _T], data: bytes | None, age_s: float | None = None) -> Iterable[_T]:
    """Give what is encoded there, if anything is; a record gets its age."""
    if data is None or len(data) > _MAX_VALUE_BYTES:
        return
    try:
        found = decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OverflowError, ValueError):
        return
    yield found if age_s is None else msgspec.structs.replace(found, age_s=age_s)

"""The engine as the event loop sees it: sessions are opened, steps are awaited, and nothing here computes.

Owns the KV pool, whose accounts it keeps on the event loop, and the worker, which computes on a thread of its own.
"""

# B batch, T tokens, D model width, N packed tokens

import asyncio
import hashlib
import math
import time
from collections.abc import Sequence
from types import TracebackType
from typing import NamedTuple, Self

import anyio
import torch

from corolla.blocks import Adapter, BlockSpan
from corolla.cache import PAGE_TOKENS, PagePool, RowKV
from corolla.engine.carry import read_row, restore_row, token_bytes
from corolla.engine.checks import check_blocks, check_context, check_forward, check_prefix, check_step, check_taps
from corolla.engine.config import EngineConfig
from corolla.engine.measure import ObservedSpeed, PageCost, free_bytes, measure_speed, page_cost
from corolla.engine.reuse import Reuse
from corolla.engine.work import FamilyRow, ForwardWork, OnWork, Result, Row, Sequences, SessionRows, StepWork
from corolla.engine.worker import Worker
from corolla.errors import PeerBusy, UsageError
from corolla.telemetry import event, logger
from corolla.terms import Span, Speed

__all__ = ["Engine", "Load"]

_LOG = logger(__name__)
_QUEUE_WEIGHT = 0.1
"""Of a new wait in the average."""
_QUEUE_HALVED_S = 10.0
"""While nothing is asked for, the average is half as long after so much time."""


class Load(NamedTuple):
    """How busy an engine is.

    Args:
        free_tokens: KV tokens that nobody was promised.
        sessions: Open sessions.
        waiting: Requests under way or waiting.
    """

    free_tokens: int
    sessions: int
    waiting: int


class Engine:
    """Computes for many sessions at once. Use it as an async context manager; its methods belong to the event loop.

    Args:
        span: The blocks to compute.
        config: Limits and shares.
        context_tokens: The longest row that the model was made for.

    Attributes:
        on_work: Hears of each piece of work that is done.
    """

    def __init__(self, span: BlockSpan, config: EngineConfig, *, context_tokens: int) -> None:
        self.span = span
        self.context_tokens = context_tokens
        self._config = config
        self._can_rewind = span.can_rewind
        self._worker = Worker(span, config)
        self._pool = PagePool(0)
        self._cost = PageCost(0.0, {}, span.dtype)
        self._closed = anyio.Event()
        self._observed = ObservedSpeed(len(span.span))
        self._queue_s = 0.0
        self._queue_at_s = 0.0
        self.on_work: OnWork | None = None

    async def __aenter__(self) -> Self:
        """Settle how much KV there is, and start to compute."""
        self._cost = await anyio.to_thread.run_sync(page_cost, self.span)
        kv_bytes = self._config.kv_bytes or free_bytes(self.span.device) // 2
        self.span.graph_bytes = self._config.graph_bytes or free_bytes(self.span.device) // 8
        page_bytes = self._cost.token_bytes * PAGE_TOKENS
        self._pool = PagePool(max(1, int(kv_bytes // page_bytes)))
        self._worker.reuse = Reuse(min(self._pool.pages, int(self._config.kept_bytes // page_bytes)))
        event(
            _LOG,
            "engine started",
            span=self.span.span,
            packed=self.span.is_packable,
            kv_tokens=self._pool.pages * PAGE_TOKENS,
            kv_bytes_per_token=self._cost.token_bytes,
            graph_bytes=self.span.graph_bytes,
        )
        self._worker.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with anyio.CancelScope(shield=True):  # bounded by one tick
            await anyio.to_thread.run_sync(self._worker.stop)

    @property
    def load(self) -> Load:
        """How busy the engine is now."""
        return Load(self._pool.free_tokens, self._pool.sessions, self._worker.waiting)

    @property
    def kv_pages(self) -> int:
        """How many KV pages there are in all."""
        return self._pool.pages

    @property
    def queue_s(self) -> float:
        """How long requests waited lately before they were computed, on average."""
        return self._queue_s * math.exp2(-(time.perf_counter() - self._queue_at_s) / _QUEUE_HALVED_S)

    async def measure(self) -> Speed:
        """Measure how fast the blocks are on this machine; takes about a second."""
        speed = await measure_speed(self)
        self._observed.assume(speed)
        return speed

    def assume(self, speed: Speed) -> None:
        """Take a speed for measured."""
        self._observed.assume(speed)

    @property
    def speed(self) -> Speed | None:
        """How fast the blocks are: as measured or assumed, corrected by the sessions since; ``None`` before that."""
        return self._observed.speed

    def open_session(
        self,
        blocks: Span,
        rows: int,
        max_tokens: int,
        adapter: Adapter | None = None,
        *,
        scope: bytes | None = None,
        client: str = "",
    ) -> SessionRows:
        """Let a session in.

        Args:
            blocks: The blocks that it runs, within the engine's span.
            rows: How many rows it has.
            max_tokens: How many tokens each row is expected to reach.
            adapter: What is added to the blocks; ``None`` for nothing.
            scope: Sessions of the same scope, and of the same blocks, are not computed again what one of them was, and
                hold it once; it says what is added to the blocks, if anything is. ``None`` to share nothing.
            client: Whose it is; prompts of clients take turns.

        Raises:
            UsageError: If the adapter has a prefix for some of the blocks only.
            ContextTooLong: If the model was not made for so many tokens.
            UsageError: If the engine does not have these blocks.
            CacheFull: If the pool could never hold them.
            PeerBusy: If the pool cannot hold them now.
        """
        if rows < 1:
            raise UsageError(f"a session of {rows} rows was asked for; it needs at least one")
        check_blocks(blocks, self.span.span)
        check_prefix(adapter, blocks)
        prefix_tokens = 0 if adapter is None else adapter.prefix_tokens
        check_context(prefix_tokens + max_tokens, self.context_tokens)
        capacity_tokens = prefix_tokens + max_tokens
        lease = self._pool.lease(rows, capacity_tokens)
        self._worker.reuse.make_room(self._pool.free_pages)
        new_rows = tuple(self._new_row(capacity_tokens) for _ in range(rows))
        session = SessionRows(blocks, lease, new_rows, adapter, client=client)
        if scope is not None and not prefix_tokens and self.span.is_chunkable:
            self._worker.reuse.watch(session.idle_rows(), hashlib.sha256(f"{blocks}:".encode() + scope).digest())
        return session

    def close_session(self, session: SessionRows) -> None:
        """Take a session's pages back, also while a step is under way. Doing it twice does no harm."""
        self._worker.reuse.keep(session)
        session.end("the session was closed")
        self._worker.tidy()
        self._closed.set()
        self._closed = anyio.Event()

    async def wait_until_idle(self) -> None:
        """Wait until no session is open."""
        while self._pool.sessions:
            await self._closed.wait()

    async def step(
        self,
        session: SessionRows,
        hidden_ND: torch.Tensor,
        *,
        starts: tuple[int, ...],
        counts: tuple[int, ...],
        order: tuple[int, ...] | None = None,
        taps: tuple[int, ...] = (),
    ) -> Result:
        """Run new tokens of a session's rows through its blocks. A session has one step at a time.

        A step that is refused leaves the session as it was; one that fails, or is cancelled, ends it.

        Args:
            session: Whose.
            hidden_ND: The tokens, row after row, in the span's dtype.
            starts: For each row, how many stored tokens it keeps.
            counts: For each row, how many new tokens follow.
            order: For each row, the row that it continues.
            taps: Blocks whose outputs are wanted as well.

        Returns:
            The output ``[N, D]`` and the taps', in order.

        Raises:
            SessionClosed: If the session has ended.
            SessionExpired: If it is taken back to where windows have let go of tokens.
            ContextTooLong: If a row would become longer than the model's context.
            UsageError: If the step does not fit the session, another is under way, or the family cannot be rewound.
            CacheFull: If the pool has no room for the tokens.
            PeerBusy: If too much waits already, or the engine is stopping.
            InternalError: If computing failed.
        """
        work = StepWork(session, hidden_ND, starts, counts, order, taps)
        check_taps(taps, session.blocks)
        check_step(work, can_rewind=self._can_rewind)
        lengths = [start + count for start, count in zip(work.starts, counts, strict=True)]
        check_context(max(lengths), self.context_tokens)
        stored = [row.length for row in work.rows]
        self._hold(session, lengths)
        try:
            done = self._put(work)
        except PeerBusy:
            session.lease.hold(stored)
            raise
        session.rows = None
        try:
            result = await self._wait(work, done)
        except BaseException:
            session.end("a step of this session failed or was given up")
            raise
        if not session.ended:
            session.rows = work.rows
        # What was learned is written down once the result is on its way, for which nothing is awaited as a rule.
        asyncio.get_running_loop().call_soon(self._learn, session.blocks, counts, result)
        return result

    async def forward(
        self,
        blocks: Span,
        sequences: Sequences,
        *,
        taps: tuple[int, ...] = (),
        grads_BTD: tuple[torch.Tensor, ...] | None = None,
        adapter: Adapter | None = None,
        trains: bool = False,
    ) -> Result:
        """Run whole sequences through blocks and keep nothing; with ``grads_BTD``, run them back.

        Args:
            blocks: The blocks to run, within the engine's span.
            sequences: What goes through them, in the span's dtype.
            taps: Blocks whose outputs are wanted, or have gradients, as well.
            grads_BTD: The gradients with respect to the output and to the taps.
            adapter: What is added to the blocks; ``None`` for nothing.
            trains: On the way back, whether the adapter's gradient is wanted as well.

        Returns:
            The output and the taps'; or the gradient with respect to the input, and then those with respect to the
            adapter's tensors.

        Raises:
            UsageError: If the adapter has a prefix for some of the blocks only.
            ContextTooLong: If the sequences are longer than the model's context.
            UsageError: If blocks or taps are not the engine's, or the tensors do not fit each other.
            PeerBusy: If too much waits already, or the engine is stopping.
            InternalError: If computing failed.
        """
        work = ForwardWork(blocks, sequences, taps, grads_BTD, adapter, trains)
        check_blocks(blocks, self.span.span)
        check_prefix(adapter, blocks)
        check_taps(taps, blocks)
        check_forward(work, self.context_tokens)
        result = await self._wait(work, self._put(work))
        if self.on_work is not None:
            rows, tokens = sequences.hidden_BTD.shape[:2]
            self.on_work("forward" if grads_BTD is None else "backward", rows * tokens, result)
        return result

    def token_bytes(self, session: SessionRows) -> int:
        """Say how many bytes of keys and values one token of a session's row has; 0 if they cannot be read."""
        return token_bytes(session, self._cost)

    def read(self, session: SessionRows, row: int, start: int, stop: int) -> list[torch.Tensor]:
        """Copy some tokens of a row out of the engine; see :func:`corolla.engine.carry.read_row`.

        Raises:
            SessionClosed: If the session has ended.
            UsageError: If a step has the rows, or the family keeps a cache of its own.
        """
        return read_row(session, row, start, stop)

    def restore(self, session: SessionRows, row: int, start: int, tensors: Sequence[torch.Tensor]) -> None:
        """Take tokens in that another engine has computed; see :func:`corolla.engine.carry.restore_row`.

        Raises:
            SessionClosed: If the session has ended.
            UsageError: If they are not what this engine would have stored, or do not follow what it has.
            CacheFull: If the pool has no room for them.
        """
        with self._worker.reuse.lock:
            restore_row(session, row, start, tensors, self._cost, self.span.device)
        self._worker.reuse.make_room(self._pool.free_pages)

    def shorten(self, session: SessionRows, lengths: Sequence[int]) -> None:
        """Forget what rows have beyond these lengths.

        Raises:
            SessionClosed: If the session has ended.
            UsageError: If a step has the rows, or one is shorter.
        """
        rows = session.idle_rows()
        if any(length > row.length for row, length in zip(rows, lengths, strict=True)):
            raise UsageError(f"rows of {[row.length for row in rows]} tokens cannot be shortened to {[*lengths]}")
        with self._worker.reuse.lock:
            for row, length in zip(rows, lengths, strict=True):
                if length < row.length:
                    row.commit(length)
        session.lease.hold(lengths)

    @property
    def kept_pages(self) -> int:
        """How many KV pages keep what ended sessions have computed; they are free for whoever needs them."""
        return self._worker.reuse.kept_pages

    def drop_old(self) -> None:
        """Let go of what ended sessions have computed and nobody has wanted for ten minutes."""
        self._worker.reuse.drop_old()

    def check_integrity(self) -> None:
        """Verify the KV pool's accounts, and what is kept of ended sessions.

        Raises:
            AssertionError: If they do not add up: a bug in Corolla.
        """
        self._pool.check_integrity()
        self._worker.reuse.check_integrity()
        assert self.kept_pages <= self._pool.free_pages, f"{self.kept_pages} pages are kept that somebody needs"

    def _hold(self, session: SessionRows, lengths: Sequence[int]) -> None:
        session.lease.hold(lengths)
        self._worker.reuse.make_room(self._pool.free_pages)

    def _put(self, work: StepWork | ForwardWork) -> "asyncio.Future[Result]":
        """Queue work; the future is settled on the event loop."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Result] = loop.create_future()

        def settle(result: Result | Exception) -> None:
            if done.done():  # whoever waited has gone
                return
            if isinstance(result, Exception):
                done.set_exception(result)
            else:
                done.set_result(result)

        def deliver(result: Result | Exception) -> None:
            loop.call_soon_threadsafe(settle, result)

        work.deliver = deliver
        self._worker.put(work)
        return done

    async def _wait(self, work: StepWork | ForwardWork, done: "asyncio.Future[Result]") -> Result:
        try:
            result = await done
        finally:
            work.is_cancelled = not done.done() or done.cancelled()
        self._queue_s = self.queue_s + _QUEUE_WEIGHT * (result.queue_s - self.queue_s)
        self._queue_at_s = time.perf_counter()
        return result

    def _learn(self, blocks: Span, counts: tuple[int, ...], result: Result) -> None:
        if not result.found_tokens:
            self._observed.note(len(blocks), counts, result.compute_s)
        if self.on_work is not None:
            tokens = sum(counts) - result.found_tokens
            self.on_work("decode" if max(counts) == 1 else "prefill", tokens, result)

    def _new_row(self, capacity_tokens: int) -> Row:
        if self.span.is_packable:
            return RowKV(capacity_tokens, self._cost.windows)
        return FamilyRow(self.span.new_cache())

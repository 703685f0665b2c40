"""The engine as the event loop sees it: sessions are opened, steps are awaited, and nothing here computes.

Owns the KV pool, whose accounts it keeps on the event loop, and the worker, which computes on a thread of its own.
"""

# B batch, T tokens, D model width, N packed tokens

import asyncio
from collections.abc import Sequence
from types import TracebackType
from typing import NamedTuple, Self

import anyio
import psutil
import torch

from corolla.blocks import BlockSpan
from corolla.cache import PAGE_TOKENS, PagePool, RowKV
from corolla.engine.config import EngineConfig
from corolla.engine.measure import kv_bytes_per_token, measure_speed
from corolla.engine.work import FamilyRow, ForwardWork, Result, Row, SessionRows, StepWork
from corolla.engine.worker import Worker
from corolla.errors import ContextTooLong, UsageError
from corolla.telemetry import event, logger
from corolla.terms import Span, Speed

__all__ = ["Engine", "Load"]

_LOG = logger(__name__)


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
    """

    def __init__(self, span: BlockSpan, config: EngineConfig, *, context_tokens: int) -> None:
        self.span = span
        self.context_tokens = context_tokens
        self._worker = Worker(span, config)
        self._idle = anyio.Event()
        token_bytes = kv_bytes_per_token(span)
        kv_bytes = config.kv_bytes if config.kv_bytes is not None else psutil.virtual_memory().available // 2
        self._pool = PagePool(max(1, int(kv_bytes // (token_bytes * PAGE_TOKENS))))
        event(
            _LOG,
            "engine made",
            span=span.span,
            packed=span.is_packable,
            kv_tokens=self._pool.pages * PAGE_TOKENS,
            kv_bytes_per_token=token_bytes,
        )

    async def __aenter__(self) -> Self:
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

    async def measure(self) -> Speed:
        """Measure how fast the blocks are on this machine; takes about a second."""
        return await measure_speed(self)

    def open_session(self, blocks: Span, rows: int, max_tokens: int) -> SessionRows:
        """Let a session in.

        Args:
            blocks: The blocks that it runs, within the engine's span.
            rows: How many rows it has.
            max_tokens: How many tokens each row is expected to reach.

        Raises:
            ContextTooLong: If the model was not made for so many tokens.
            UsageError: If the engine does not have these blocks.
            CacheFull: If the pool could never hold them.
            PeerBusy: If the pool cannot hold them now.
        """
        self._check_blocks(blocks)
        self._check_context(max_tokens)
        return SessionRows(blocks, self._pool.lease(rows, max_tokens), [self._new_row() for _ in range(rows)])

    def close_session(self, session: SessionRows) -> None:
        """Take a session's pages back. Doing it twice does no harm."""
        session.lease.release()
        session.rows = []
        if not self._pool.sessions:
            self._idle.set()

    async def wait_until_idle(self) -> None:
        """Wait until no session is open."""
        while self._pool.sessions:
            self._idle = anyio.Event()
            await self._idle.wait()

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
        """Run new tokens of a session's rows through its blocks.

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
            ContextTooLong: If a row would become longer than the model's context.
            UsageError: If a tap is not among the session's blocks, or the family cannot be rewound.
            CacheFull: If the pool has no room for the tokens; the session is as it was.
            PeerBusy: If too much waits already.
            InternalError: If computing failed; the session cannot go on.
        """
        self._check_taps(taps, session.blocks)
        lengths = [start + count for start, count in zip(starts, counts, strict=True)]
        self._check_context(max(lengths))
        if not self.span.can_rewind:
            self._check_goes_on(session, starts, order)
        session.lease.hold(lengths)
        return await self._submit(StepWork(session, hidden_ND, starts, counts, order, taps))

    async def forward(
        self,
        blocks: Span,
        hidden_BTD: torch.Tensor,
        *,
        attention_mask_BT: torch.Tensor | None = None,
        position_ids_BT: torch.Tensor | None = None,
        taps: tuple[int, ...] = (),
        grads_BTD: tuple[torch.Tensor, ...] | None = None,
    ) -> Result:
        """Run whole sequences through blocks and keep nothing; with ``grads_BTD``, run them back.

        Args:
            blocks: The blocks to run, within the engine's span.
            hidden_BTD: Their input, in the span's dtype.
            attention_mask_BT: 0 for padding.
            position_ids_BT: Where each token stands; ``None`` for 0, 1, 2, ...
            taps: Blocks whose outputs are wanted, or have gradients, as well.
            grads_BTD: The gradients with respect to the output and to the taps.

        Returns:
            The output and the taps'; or the gradient with respect to the input.

        Raises:
            ContextTooLong: If the sequences are longer than the model's context.
            UsageError: If blocks or taps are not the engine's.
            PeerBusy: If too much waits already.
            InternalError: If computing failed.
        """
        self._check_blocks(blocks)
        self._check_taps(taps, blocks)
        self._check_context(hidden_BTD.shape[1])
        return await self._submit(ForwardWork(blocks, hidden_BTD, attention_mask_BT, position_ids_BT, taps, grads_BTD))

    def check_integrity(self) -> None:
        """Verify the KV pool's accounts.

        Raises:
            AssertionError: If they do not add up: a bug in Corolla.
        """
        self._pool.check_integrity()

    async def _submit(self, work: StepWork | ForwardWork) -> Result:
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
        try:
            return await done
        finally:
            work.is_cancelled = not done.done() or done.cancelled()

    def _new_row(self) -> Row:
        if self.span.is_packable:
            return RowKV()
        return FamilyRow(self.span.new_cache())

    def _check_blocks(self, blocks: Span) -> None:
        if not self.span.span.covers(blocks):
            raise UsageError(
                f"blocks {blocks} were asked of a server that has {self.span.span}; look at the swarm again"
            )

    def _check_taps(self, taps: Sequence[int], blocks: Span) -> None:
        if outside := [block for block in taps if block not in blocks]:
            raise UsageError(f"the outputs of blocks {outside} were asked for, but only {blocks} are run here")

    def _check_context(self, tokens: int) -> None:
        if tokens > self.context_tokens:
            raise ContextTooLong(
                f"{tokens} tokens are more than the {self.context_tokens} that this model was made for; "
                "shorten the prompt or ask for fewer new tokens"
            )

    def _check_goes_on(self, session: SessionRows, starts: Sequence[int], order: Sequence[int] | None) -> None:
        """Families with recurrent state can only go on from where they are."""
        lengths = [row.length for row in session.rows]
        stored = lengths if order is None else [lengths[row] for row in order]
        if list(starts) != stored:
            raise UsageError(
                f"this family keeps a running state that cannot be rewound from {stored} to {list(starts)} tokens; "
                "open a new session and send the tokens again"
            )

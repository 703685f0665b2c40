"""One span in a server's charge: loaded, measured, computed on, and let go when its sessions have ended.

Owns the engine and, with it, the blocks' memory, which is free again when :meth:`Tenure.end` returns. Knows nothing of
the swarm: why this span, and who asks for it.
"""

from functools import partial

import anyio
from anyio.abc import TaskStatus

from corolla.blocks import context_tokens
from corolla.engine import Engine, EngineConfig
from corolla.hub import Progress, Unit
from corolla.server.loading import Model, load_blocks
from corolla.telemetry import event, logger
from corolla.terms import Span
from corolla.wire.limits import MAX_STEP_TOKENS

__all__ = ["Tenure"]

_LOG = logger(__name__)
_FILES_SHARE = 0.5
"""Of the progress, that of having the files on this disk."""
_LOOK_S = 10.0
"""How often to look for what is kept of sessions that ended long ago."""


class Tenure:
    """The time that a server serves one span. It runs as a task of its own.

    Args:
        model: The model.
        span: Which of its blocks.
        config: How to compute.

    Attributes:
        span: Which blocks.
        progress: How much of them is loaded, from 0 to 1.
        load_s: How long downloading and loading took.
        engine: What computes; ``None`` before and after.
    """

    def __init__(self, model: Model, span: Span, config: EngineConfig) -> None:
        self.span = span
        self.progress = 0.0
        self.load_s = 0.0
        self.engine: Engine | None = None
        self._model = model
        self._config = config
        self._is_over = anyio.Event()
        self._has_ended = anyio.Event()

    async def run(self, report: Progress, *, task_status: TaskStatus[Engine] = anyio.TASK_STATUS_IGNORED) -> None:
        """Load the blocks, say so with their engine, and keep them until :meth:`end`.

        Args:
            report: Hears how far it is, from a thread.
            task_status: Given the engine.

        Raises:
            ModelError: If files cannot be had or read.
            CapacityError: If there is no room for them.
        """
        started_s = anyio.current_time()
        try:
            load = partial(load_blocks, self._model, self.span, self._config, partial(self._note, report))
            blocks = await anyio.to_thread.run_sync(load, abandon_on_cancel=True)
            context = context_tokens(self._model.config) or MAX_STEP_TOKENS
            async with Engine(blocks, self._config, context_tokens=context) as self.engine:
                del blocks
                self.progress, self.load_s = 1.0, anyio.current_time() - started_s
                task_status.started(self.engine)
                while not self._is_over.is_set():
                    with anyio.move_on_after(_LOOK_S):
                        await self._is_over.wait()
                    self.engine.drop_old()
            self.engine = None
        finally:
            self._has_ended.set()

    async def end(self, drain_s: float) -> None:
        """Let the sessions finish, and let go of the blocks.

        Args:
            drain_s: How long the sessions may take; what is still open then ends with an error.
        """
        engine = self.engine
        if engine is not None:
            with anyio.move_on_after(drain_s) as limit:
                await engine.wait_until_idle()
            if limit.cancelled_caught:
                event(_LOG, "ended with sessions open", sessions=engine.load.sessions, after_s=drain_s)
        self._is_over.set()
        await self._has_ended.wait()

    def _note(self, report: Progress, label: str, done: int, total: int | None, unit: Unit) -> None:
        if total:
            share = done / total
            self.progress = _FILES_SHARE + share * (1 - _FILES_SHARE) if unit == "tensors" else share * _FILES_SHARE
        report(label, done, total, unit)

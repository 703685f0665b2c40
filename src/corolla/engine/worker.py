"""The one compute thread of a device: it takes ticks from the scheduler, computes them and delivers what is complete.

Owns the thread, and with it every row's tensors. The event loop only puts work in and hears of results.
"""

import logging
import threading
import time

import torch

from corolla.blocks import BlockSpan
from corolla.engine.compute import run_forward, run_steps
from corolla.engine.config import EngineConfig
from corolla.engine.scheduler import ForwardTick, Scheduler, StepTick
from corolla.engine.work import ForwardWork, Result, StepWork
from corolla.errors import Error, InternalError, PeerBusy
from corolla.telemetry import event, logger

__all__ = ["Worker"]


class Worker:
    """A compute thread over a span of blocks. Start it, put work in from any thread, stop it.

    Args:
        span: The blocks.
        config: Limits and shares.
    """

    def __init__(self, span: BlockSpan, config: EngineConfig) -> None:
        self._span = span
        self._config = config
        self._scheduler = Scheduler(config)
        self._changed = threading.Condition()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="corolla-compute")

    @property
    def waiting(self) -> int:
        """How many requests are under way or wait."""
        return len(self._scheduler)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its present tick; whoever still waits gets :class:`PeerBusy`. Blocks until then."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
        self._thread.join()

    def put(self, work: StepWork | ForwardWork) -> None:
        """Queue work; its ``deliver`` is called with the result, on the compute thread.

        Raises:
            PeerBusy: If too much waits already, or the worker is stopping.
        """
        work.queued_at_s = time.perf_counter()
        with self._changed:
            if self._is_stopping:
                raise PeerBusy("the server is leaving", retry_after_s=60.0)
            self._scheduler.put(work)
            self._changed.notify()

    def _run(self) -> None:
        if self._config.threads is not None:
            torch.set_num_threads(self._config.threads)
        while (tick := self._next()) is not None:
            started_at_s = time.perf_counter()
            works = [work for work, _ in tick.parts] if isinstance(tick, StepTick) else [tick.work]
            for work in works:
                work.started_at_s = work.started_at_s or started_at_s
            failure = self._compute(tick)
            elapsed_s = time.perf_counter() - started_at_s
            for work in works:
                work.compute_s += elapsed_s
                self._settle(work, failure)
        for work in self._drop_all():
            work.deliver(PeerBusy("the server is leaving", retry_after_s=60.0))

    def _next(self) -> StepTick | ForwardTick | None:
        with self._changed:
            while not self._is_stopping:
                if (tick := self._scheduler.take()) is not None:
                    return tick
                self._changed.wait()
        return None

    def _compute(self, tick: StepTick | ForwardTick) -> Exception | None:
        try:
            if isinstance(tick, StepTick):
                run_steps(self._span, tick)
            else:
                run_forward(self._span, tick)
        except Error as error:
            return error
        except Exception as error:  # noqa: BLE001 - one bad tick must not take the server down; whoever asked is told
            event(logger(__name__), "tick failed", level=logging.ERROR, error=error)
            return InternalError(f"computing failed: {error!r}")
        return None

    def _settle(self, work: StepWork | ForwardWork, failure: Exception | None) -> None:
        is_complete = work.left_tokens == 0 if isinstance(work, StepWork) else work.done_rows == len(work.hidden_BTD)
        with self._changed:
            if failure is None and not is_complete:
                if isinstance(work, ForwardWork):
                    self._scheduler.rotate()
                return
            self._scheduler.finish(work)
        queue_s = (work.started_at_s or work.queued_at_s) - work.queued_at_s
        work.deliver(failure or Result(work.outputs, queue_s, work.compute_s))

    def _drop_all(self) -> list[StepWork | ForwardWork]:
        with self._changed:
            dropped = self._scheduler.waiting()
            for work in dropped:
                self._scheduler.finish(work)
        return dropped

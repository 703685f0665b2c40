"""The one compute thread of a device: it takes ticks from the scheduler, computes them and delivers what is complete.

Owns the thread, and with it the rows of every step under way. The event loop only puts work in and hears of results.
"""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from corolla.blocks import BlockSpan
from corolla.engine.compute import run_forward, run_steps
from corolla.engine.config import EngineConfig
from corolla.engine.gathering import Gathering
from corolla.engine.heap import BULK_TOKENS, give_back
from corolla.engine.reuse import Reuse
from corolla.engine.scheduler import ForwardTick, Scheduler, StepTick
from corolla.engine.work import ForwardWork, Result, StepWork
from corolla.errors import InternalError, PeerBusy
from corolla.telemetry import event, logger

__all__ = ["Worker", "computing_threads"]

_LOG = logger(__name__)


@contextmanager
def computing_threads(config: EngineConfig) -> Iterator[None]:
    """Compute with as many threads as the settings say while the body runs on the present one.

    Args:
        config: Says how many.
    """
    # The number holds for the thread that sets it and for those still to come. A thread that sets none does its first
    # sums with another number than the later ones, so with another result.
    usual_threads = torch.get_num_threads()
    torch.set_num_threads(config.threads or usual_threads)
    try:
        yield
    finally:
        torch.set_num_threads(usual_threads)


class Worker:
    """A compute thread over a span of blocks. Start it, put work in from any thread, stop it.

    Args:
        span: The blocks.
        config: Limits and shares.

    Attributes:
        reuse: What rows may begin with.
    """

    def __init__(self, span: BlockSpan, config: EngineConfig) -> None:
        self.reuse = Reuse(0)
        self._span = span
        self._config = config
        self._scheduler = Scheduler(config)
        self._gathering = Gathering()
        self._changed = threading.Condition()
        self._is_stopping = False
        self._is_untidy = True  # loading has left something as well
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
        """Queue work; its ``deliver`` is called with the result, on the compute thread, unless it is cancelled.

        Raises:
            PeerBusy: If too much waits already, or the worker is stopping.
        """
        work.queued_at_s = time.perf_counter()
        with self._changed:
            if self._is_stopping:
                raise _leaving()
            self._scheduler.put(work)
            self._changed.notify()

    def tidy(self) -> None:
        """Give memory that was freed back to the system as soon as nothing waits."""
        with self._changed:
            self._is_untidy = True
            self._changed.notify()

    def _run(self) -> None:
        with computing_threads(self._config):
            try:
                while self._tick():
                    pass
            finally:  # also after a bug of our own: nobody waits for ever
                for work in self._drop_all():
                    work.deliver(_leaving())

    def _tick(self) -> bool:
        # In a frame of its own, so that whoever waits for the next tick does not keep the last one's rows in memory.
        match self._next():
            case None:
                return False
            case "tidy":
                give_back()
            case StepWork() as work:
                self._begin(work)
            case tick:
                self._compute(tick)
        return True

    def _next(self) -> StepTick | ForwardTick | StepWork | Literal["tidy"] | None:
        with self._changed:
            free_at_s: float | None = None
            while not self._is_stopping:
                if (work := self._scheduler.fresh()) is not None:
                    return work
                if sessions := self._scheduler.gathered:
                    now_s = time.perf_counter()
                    free_at_s = free_at_s or now_s
                    if (left_s := self._gathering.wait_s(sessions, free_at_s, now_s)) > 0:
                        self._changed.wait(left_s)
                        continue
                prompt_tokens = self._gathering.prompt_tokens(self._config.tick_ms / 1e3, time.perf_counter())
                if len(self._scheduler) and (tick := self._scheduler.take(prompt_tokens)) is not None:
                    return tick
                if self._is_untidy:
                    self._is_untidy = False
                    return "tidy"
                self._changed.wait()
        return None

    def _begin(self, work: StepWork) -> None:
        try:
            with torch.inference_mode():
                self.reuse.begin(work)
        except Exception as error:  # noqa: BLE001 - as in a tick
            event(_LOG, "step could not begin", level=logging.ERROR, error=error)
            self._settle(work, f"a step on blocks {self._span.span} could not begin: {error!r}")
            return
        if work.is_complete:
            self._settle(work, "")

    def _compute(self, tick: StepTick | ForwardTick) -> None:
        works = [work for work, _ in tick.parts] if isinstance(tick, StepTick) else [tick.work]
        started_at_s = time.perf_counter()
        for work in works:
            work.started_at_s = work.started_at_s or started_at_s
        failure = ""
        try:
            if isinstance(tick, StepTick):
                run_steps(self._span, tick)
            else:
                run_forward(self._span, tick)
        except Exception as error:  # noqa: BLE001 - one bad tick must not take the server down; whoever asked is told
            event(_LOG, "tick failed", level=logging.ERROR, error=error, requests=len(works))
            failure = f"computing blocks {self._span.span} failed: {error!r}"
        elapsed_s = time.perf_counter() - started_at_s
        if isinstance(tick, StepTick) and tick.is_decoding:
            self._gathering.note([work.session for work, _ in tick.parts], started_at_s, elapsed_s)
        elif isinstance(tick, StepTick):
            decoding, prompt_tokens = tick.apart()
            self._gathering.note_prompt(decoding, prompt_tokens, started_at_s, elapsed_s)
        for work in works:
            work.compute_s += elapsed_s
            if failure or work.is_complete:
                self._settle(work, failure)
        self._is_untidy = self._is_untidy or tick.tokens >= BULK_TOKENS

    def _settle(self, work: StepWork | ForwardWork, failure: str) -> None:
        with self._changed:
            self._scheduler.finish(work)
        if failure:
            work.deliver(InternalError(failure))
        else:
            queue_s = (work.started_at_s or work.queued_at_s) - work.queued_at_s
            found_tokens = work.found_tokens if isinstance(work, StepWork) else 0
            work.deliver(Result(work.results, queue_s, work.compute_s, found_tokens))

    def _drop_all(self) -> list[StepWork | ForwardWork]:
        with self._changed:
            self._is_stopping = True
            dropped = self._scheduler.waiting()
            for work in dropped:
                self._scheduler.finish(work)
        return dropped


def _leaving() -> PeerBusy:
    return PeerBusy("the server is leaving", retry_after_s=60.0)

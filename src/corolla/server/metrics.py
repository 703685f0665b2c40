"""What a server tells Prometheus: what it says of itself to the swarm, and how long its work takes.

Owns the registry. Knows nothing of who reads it; :mod:`corolla.telemetry.metrics` opens the port.
"""

import asyncio
from collections import Counter as Counts
from collections.abc import Callable, Mapping
from typing import Final, get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector

from corolla.engine import Result, WorkKind
from corolla.swarm import RelayLoad
from corolla.swarm.reach.metrics import relay_readings
from corolla.telemetry.metrics import GenerationMetrics, Operation, Reading, Readings
from corolla.terms import Announcement, ServerState

__all__ = ["ServerMetrics"]

_QUEUE_BUCKETS_S: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class ServerMetrics:
    """The metrics of one server.

    Args:
        refused: How many requests were refused, by the code of the error.
        relay_load: Gives what it does for others; ``None`` if it is no relay.

    Attributes:
        registry: Where they all are.
    """

    def __init__(self, refused: Counts[str], relay_load: Callable[[], RelayLoad | None]) -> None:
        self.registry = CollectorRegistry()
        self._said: Announcement | None = None
        self._tasks: int | None = None
        self._generation = GenerationMetrics(self.registry)
        self._tokens = Counter(
            "corolla_server_tokens", "Tokens that went through the span.", ["kind"], registry=self.registry
        )
        self._compute = Counter(
            "corolla_server_compute_seconds", "Time in which work was computed.", ["kind"], registry=self.registry
        )
        self._queue = Histogram(
            "corolla_server_queue_seconds",
            "Time that work waited for its first tick.",
            buckets=_QUEUE_BUCKETS_S,
            registry=self.registry,
        )
        Readings(
            self.registry,
            [
                Reading("corolla_server_refused_total", "Requests refused.", lambda: dict(refused), "code"),
                Reading("corolla_server_state", "1 for what it is doing.", self._states, "state"),
                Reading("corolla_server_blocks", "Blocks that it serves.", self._say(lambda one: len(one.span))),
                Reading("corolla_server_first_block", "Of its span.", self._say(lambda one: one.span.start)),
                Reading("corolla_server_progress", "Of loading, 0 to 1.", self._say(lambda one: one.progress)),
                Reading("corolla_server_sessions", "Open sessions.", self._say(lambda one: one.sessions)),
                Reading("corolla_server_free_kv_tokens", "Promised to nobody.", self._say(lambda one: one.free_tokens)),
                Reading("corolla_server_tasks", "When it last announced itself.", lambda: self._tasks),
                Reading("corolla_server_tokens_per_second", "For one session or a prompt.", self._speeds, "kind"),
                *relay_readings(relay_load),
            ],
        )
        ProcessCollector(registry=self.registry)

    def note_said(self, announcement: Announcement) -> None:
        """Note what the server says of itself now; on its event loop."""
        self._said = announcement
        self._tasks = len(asyncio.all_tasks())

    def note_work(self, kind: WorkKind, tokens: int, result: Result) -> None:
        """Note what came of some work.

        Args:
            kind: Of which kind it was.
            tokens: How many it had.
            result: What came of it.
        """
        self._tokens.labels(kind).inc(tokens)
        self._compute.labels(kind).inc(result.compute_s)
        self._queue.observe(result.queue_s)
        model = self._said.model_name if self._said else ""
        elapsed_s = result.queue_s + result.compute_s
        operation: Operation = kind
        if operation == "decode":
            self._generation.note_token(operation, model, elapsed_s)
        else:
            self._generation.note_request(operation, model, elapsed_s)

    def _say(self, read: Callable[[Announcement], float]) -> Callable[[], float | None]:
        return lambda: None if self._said is None else read(self._said)

    def _states(self) -> Mapping[str, float]:
        state = None if self._said is None else self._said.state
        return {one: float(one == state) for one in get_args(ServerState)}

    def _speeds(self) -> Mapping[str, float]:
        speed = None if self._said is None else self._said.speed
        if speed is None:
            return {}
        return {"decode": speed.decode_tokens_per_s, "prefill": speed.prefill_tokens_per_s}

"""What happened in a session, in order: its steps, where their time went, and each decision with its reason.

A decision is logged as well, one line each, and where somebody wants traces all of it is a span of OpenTelemetry. Holds
no text, token, hidden state or key, and must be told none.
"""

import logging
import time
from collections import deque
from collections.abc import Sequence
from typing import Final, NamedTuple

from corolla.client.steps import HopTiming
from corolla.telemetry import event, logger
from corolla.telemetry.spans import begin_span

__all__ = ["Trace", "TraceEntry"]

_LOG = logger(__name__)
_KEPT: Final = 8192
_REASON_CHARACTERS: Final = 240


class TraceEntry(NamedTuple):
    """One thing that happened.

    Args:
        at_s: When, in seconds since the session began.
        what: ``step``, or which decision.
        fields: Its particulars.
        hops: Of a step, where its time went.
    """

    at_s: float
    what: str
    fields: dict[str, object]
    hops: Sequence[HopTiming] = ()


class Trace:
    """The latest entries of one session, the oldest first."""

    def __init__(self) -> None:
        self._began_s = time.perf_counter()
        self._entries: deque[TraceEntry] = deque(maxlen=_KEPT)
        self._span = begin_span("session", {})

    @property
    def entries(self) -> tuple[TraceEntry, ...]:
        """What is remembered."""
        return tuple(self._entries)

    @property
    def context(self) -> bytes | None:
        """What lets servers add to the trace that OpenTelemetry is told; ``None`` if it is told none."""
        return None if self._span is None else self._span.context

    def forget(self) -> None:
        """Remember nothing of what has happened; for a session that goes on when nobody will ask what did."""
        self._entries.clear()

    def end(self) -> None:
        """Say that the session is over; doing so twice does no harm."""
        if self._span is not None:
            self._span.end()

    def decide(self, what: str, /, *, why: str = "", level: int = logging.INFO, **fields: object) -> None:
        """Note a decision, and log it.

        Args:
            what: Which, as a constant.
            why: The reason; what a peer has said is cut short.
            level: Of the log.
            **fields: Its particulars.
        """
        if why:
            fields["why"] = why[:_REASON_CHARACTERS]
        event(_LOG, what, level=level, **fields)  # type: ignore[arg-type]
        if self._span is not None:
            self._span.note(what, fields)
        self._note(what, fields)

    def step(self, tokens: int, elapsed_s: float, hops: Sequence[HopTiming]) -> None:
        """Note a step.

        Args:
            tokens: How many tokens it had.
            elapsed_s: How long it took.
            hops: Where its time went.
        """
        if self._span is not None:
            self._span.part("step", elapsed_s, {"tokens": tokens, "hops": len(hops)})
        self._note("step", {"tokens": tokens, "elapsed_s": round(elapsed_s, 6)}, hops)

    def _note(self, what: str, fields: dict[str, object], hops: Sequence[HopTiming] = ()) -> None:
        self._entries.append(TraceEntry(time.perf_counter() - self._began_s, what, fields, hops))

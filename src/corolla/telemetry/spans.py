"""Traces for OpenTelemetry: a session's steps as its client and each of its servers see them, in one trace.

Whoever wants them sets a provider of OpenTelemetry's SDK, as :func:`export_spans` does; otherwise nothing is recorded,
nothing is sent, and the packages need not be there. A trace holds no text, token, hidden state or key.
"""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from corolla.errors import ConfigError

__all__ = ["Span", "begin_span", "export_spans"]

_NS: Final = 1_000_000_000


class Span:
    """Something that takes time. Made by :func:`begin_span`; it is exported when it ends.

    Args:
        tracer: OpenTelemetry's.
        span: OpenTelemetry's.
    """

    def __init__(self, tracer: Any, span: Any) -> None:  # noqa: ANN401 - the package need not be there
        self._tracer = tracer
        self._span = span

    @property
    def context(self) -> bytes:
        """What lets another process add to this trace, below this span: 16 bytes that name the one, 8 the other."""
        own = self._span.get_span_context()
        return int(own.trace_id).to_bytes(16, "big") + int(own.span_id).to_bytes(8, "big")

    def note(self, what: str, fields: Mapping[str, object]) -> None:
        """Note what happened meanwhile."""
        self._span.add_event(what, _plain(fields))

    def part(self, name: str, elapsed_s: float, fields: Mapping[str, object]) -> None:
        """Note a part that has just ended."""
        from opentelemetry.trace import set_span_in_context

        now_ns = time.time_ns()
        part = self._tracer.start_span(
            name,
            context=set_span_in_context(self._span),
            start_time=now_ns - int(elapsed_s * _NS),
            attributes=_plain(fields),
        )
        part.end(now_ns)

    def end(self, fields: Mapping[str, object] | None = None) -> None:
        """End it; doing so twice does no harm."""
        if self._span.is_recording():
            self._span.set_attributes(_plain(fields or {}))
            self._span.end()


def begin_span(name: str, fields: Mapping[str, object], *, above: bytes | None = None) -> Span | None:
    """Begin a span, if somebody wants traces.

    Args:
        name: What takes time, as a constant.
        fields: Its particulars.
        above: The context of the span that it is a part of; ``None`` for the present one of this process, if any.
    """
    api = sys.modules.get("opentelemetry.trace")  # who wants traces has imported it
    provider = api.get_tracer_provider() if api is not None else None
    if api is None or provider is None or isinstance(provider, api.ProxyTracerProvider):
        return None
    tracer = provider.get_tracer("corolla")
    context = None
    if above is not None:
        far = api.SpanContext(
            int.from_bytes(above[:16], "big"),
            int.from_bytes(above[16:], "big"),
            is_remote=True,
            trace_flags=api.TraceFlags(api.TraceFlags.SAMPLED),
        )
        context = api.set_span_in_context(api.NonRecordingSpan(far))
    return Span(tracer, tracer.start_span(name, context=context, attributes=_plain(fields)))


@contextmanager
def export_spans(url: str | None, program: str) -> Iterator[None]:
    """Send the spans of this process to a collector during a ``with``.

    Args:
        url: Where it takes OTLP over HTTP, as ``http://127.0.0.1:4318/v1/traces``; ``None`` for no traces.
        program: What this process is, as a collector shows it.

    Raises:
        ConfigError: If the URL is none.
    """
    if url is None:
        yield
        return
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"{url!r} is no URL of a collector; it is as http://127.0.0.1:4318/v1/traces")
    from opentelemetry import trace
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({"service.name": program}), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))
    trace.set_tracer_provider(provider)
    try:
        yield
    finally:
        provider.shutdown()


def _plain(fields: Mapping[str, object]) -> dict[str, Any]:
    return {
        f"corolla.{name}": value if isinstance(value, str | bool | int | float) else str(value)
        for name, value in fields.items()
    }

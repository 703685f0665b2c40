"""Metrics for Prometheus, named as OpenTelemetry names those of generative models: what all programs here share.

Owns names, buckets and the port. Needs the prometheus_client package, so the rest of this room does not import it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final, Literal

from prometheus_client import CollectorRegistry, Histogram, generate_latest, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from corolla.errors import ConfigError

__all__ = ["CONTENT_TYPE", "GenerationMetrics", "Reading", "Readings", "render", "serve_metrics"]

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

PROVIDER: Final = "corolla"
"""What ``gen_ai.provider.name`` says."""

# Names, labels and buckets: OpenTelemetry, Semantic Conventions for Generative AI Metrics, as its exporters write them
# for Prometheus: dots become underscores, and the unit follows.
_TOKEN_BUCKETS_S: Final = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_FIRST_BUCKETS_S: Final = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
)  # fmt: skip
_REQUEST_BUCKETS_S: Final = (
    0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92,
)  # fmt: skip
_USAGE_BUCKETS: Final = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576, 4194304, 16777216, 67108864)
_LABELS: Final = ("gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model")

Operation = Literal["chat", "text_completion", "embeddings", "decode", "prefill", "forward", "backward"]
"""What ``gen_ai.operation.name`` says. The last four are a server's own, which does not know what its blocks are asked
for: the next token of a session, a prompt, whole sequences, and their gradients."""


class GenerationMetrics:
    """How long answers take, under the names that OpenTelemetry gives.

    A gateway notes whole answers. A server notes its own part of each token: the time in its span alone.

    Args:
        registry: Where they belong.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        def histogram(name: str, text: str, buckets: Sequence[float], *more: str) -> Histogram:
            return Histogram(name, text, (*_LABELS, *more), buckets=buckets, registry=registry)

        self._token = histogram(
            "gen_ai_server_time_per_output_token_seconds", "Time per token after the first.", _TOKEN_BUCKETS_S
        )
        self._first = histogram(
            "gen_ai_server_time_to_first_token_seconds", "Time until the first token.", _FIRST_BUCKETS_S
        )
        self._request = histogram(
            "gen_ai_server_request_duration_seconds", "Time of a whole request.", _REQUEST_BUCKETS_S, "error_type"
        )
        self._usage = histogram(
            "gen_ai_client_token_usage_tokens", "Tokens of a request.", _USAGE_BUCKETS, "gen_ai_token_type"
        )

    def note_token(self, operation: Operation, model: str, elapsed_s: float) -> None:
        """Note how long a token took that was not the first."""
        self._token.labels(operation, PROVIDER, model).observe(elapsed_s)

    def note_first_token(self, operation: Operation, model: str, elapsed_s: float) -> None:
        """Note how long the first token took."""
        self._first.labels(operation, PROVIDER, model).observe(elapsed_s)

    def note_request(self, operation: Operation, model: str, elapsed_s: float, error: str = "") -> None:
        """Note how long a request took in all.

        Args:
            operation: What was asked for.
            model: Of which model.
            elapsed_s: How long it took.
            error: The code of the error that ended it.
        """
        self._request.labels(operation, PROVIDER, model, error).observe(elapsed_s)

    def note_usage(self, operation: Operation, model: str, tokens: int, kind: Literal["input", "output"]) -> None:
        """Note how many tokens came, or were generated."""
        self._usage.labels(operation, PROVIDER, model, kind).observe(tokens)


class Reading:
    """A number that is read when somebody asks for it.

    Args:
        name: What it is called; one that ends with ``_total`` only rises.
        text: What it means.
        read: Gives the number, or one for each of the values of a label.
        label: That label.
    """

    def __init__(
        self, name: str, text: str, read: Callable[[], float | Mapping[str, float] | None], label: str | None = None
    ) -> None:
        self.name = name
        self.text = text
        self.label = label
        self._read = read

    def family(self) -> Metric:
        """Give what Prometheus is told; nothing but the name if there is no number now."""
        labels = [self.label] if self.label else []
        kind = CounterMetricFamily if self.name.endswith("_total") else GaugeMetricFamily
        family: CounterMetricFamily | GaugeMetricFamily = kind(self.name, self.text, labels=labels)
        found = self._read()
        if isinstance(found, Mapping):
            for value, number in found.items():
                family.add_metric([value], number)
        elif found is not None:
            family.add_metric([], found)
        return family


class Readings(Collector):
    """Readings that belong together.

    Args:
        registry: Where they belong.
        readings: Which.
    """

    def __init__(self, registry: CollectorRegistry, readings: Sequence[Reading]) -> None:
        self._readings = readings
        registry.register(self)

    def describe(self) -> Iterable[Metric]:
        """Say nothing of names ahead: they are distinct by the way they are written."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Read all."""
        for reading in self._readings:
            yield reading.family()


def render(registry: CollectorRegistry) -> bytes:
    """Write all metrics as Prometheus reads them."""
    return generate_latest(registry)


@contextmanager
def serve_metrics(registry: CollectorRegistry, host: str, port: int) -> Iterator[int]:
    """Answer ``/metrics`` on a port of its own, from a thread of its own, during a ``with``.

    Args:
        registry: What to tell.
        host: On which network interface.
        port: On which port; 0 for any that is free.

    Yields:
        The port.

    Raises:
        ConfigError: If the port cannot be had.
    """
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        raise ConfigError(
            f"metrics cannot be served on {host}:{port}: {error.strerror or error}; choose another port"
        ) from error
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

"""How a command that runs for long answers Prometheus, on a port of its own."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from corolla.cli.config import MetricsConfig
from corolla.cli.console import Output
from corolla.cli.flags import Flag

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

__all__ = ["METRICS_FLAGS", "answer_prometheus"]

METRICS_FLAGS: Final = (Flag("metrics.port", "--metrics-port"), Flag("metrics.host", "--metrics-host"))
"""Where Prometheus may ask."""


@contextmanager
def answer_prometheus(
    config: MetricsConfig, registry: "Callable[[], CollectorRegistry]", output: Output
) -> Iterator[None]:
    """Answer ``/metrics`` during a ``with``, if the settings say so, and say where.

    Args:
        config: Whether, and where.
        registry: Gives what is told; asked only if it is.
        output: Where to say so.

    Raises:
        ConfigError: If the port cannot be had.
    """
    if config.port is None:
        yield
        return
    from corolla.telemetry.metrics import serve_metrics  # a relay needs the package only for this

    with serve_metrics(registry(), config.host, config.port) as port:
        url = f"http://{config.host}:{port}/metrics"
        output.note(f"metrics are at {url}")
        if output.is_json:
            output.json({"stage": "metrics", "url": url})
        yield

"""Metrics are named and written as Prometheus and OpenTelemetry have it, and the port is let go of."""

from urllib.request import urlopen

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from corolla.errors import ConfigError
from corolla.telemetry.metrics import GenerationMetrics, Reading, Readings, render, serve_metrics


def read(registry):
    families = text_string_to_metric_families(render(registry).decode())
    return {(sample.name, *sorted(sample.labels.values())): sample.value for one in families for sample in one.samples}


def test_answers_are_counted_under_the_names_of_opentelemetry():
    registry = CollectorRegistry()
    metrics = GenerationMetrics(registry)
    metrics.note_first_token("chat", "org/model", 0.3)
    metrics.note_token("chat", "org/model", 0.02)
    metrics.note_token("chat", "org/model", 0.04)
    metrics.note_request("chat", "org/model", 1.5)
    metrics.note_request("chat", "org/model", 0.1, error="no_chain")
    metrics.note_usage("chat", "org/model", 17, "output")
    found = read(registry)
    labels = ("chat", "corolla", "org/model")
    assert found["gen_ai_server_time_per_output_token_seconds_sum", *labels] == pytest.approx(0.06)
    assert found["gen_ai_server_time_per_output_token_seconds_bucket", "0.025", *labels] == 1
    assert found["gen_ai_server_time_to_first_token_seconds_count", *labels] == 1
    assert found["gen_ai_server_request_duration_seconds_count", "", *labels] == 1
    assert found["gen_ai_server_request_duration_seconds_count", "chat", "corolla", "no_chain", "org/model"] == 1
    assert found["gen_ai_client_token_usage_tokens_sum", "chat", "corolla", "org/model", "output"] == 17


def test_readings_are_taken_when_somebody_asks_and_labels_cannot_break_a_line():
    registry, state = CollectorRegistry(), {"a": 1.0, 'x"} 1\nevil 2 #': 2.0}
    Readings(
        registry,
        [
            Reading("corolla_now", "Now.", lambda: len(state)),
            Reading("corolla_by", "By name.", lambda: state, "name"),
            Reading("corolla_done_total", "Done.", lambda: 3),
            Reading("corolla_unknown", "Not known.", lambda: None),
        ],
    )
    assert read(registry) == {
        ("corolla_now",): 2, ("corolla_by", "a"): 1, ("corolla_by", 'x"} 1\nevil 2 #'): 2, ("corolla_done_total",): 3,
    }  # fmt: skip
    state.clear()
    assert read(registry)["corolla_now",] == 0


def test_a_port_answers_and_is_free_afterwards():
    registry = CollectorRegistry()
    Readings(registry, [Reading("corolla_now", "Now.", lambda: 1)])
    with serve_metrics(registry, "127.0.0.1", 0) as port:
        with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            assert b"corolla_now 1.0" in answer.read()
        with pytest.raises(ConfigError, match="choose another port"), serve_metrics(registry, "127.0.0.1", port):
            pass
    with serve_metrics(registry, "127.0.0.1", port):
        pass

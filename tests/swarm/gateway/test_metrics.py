"""What a gateway tells Prometheus: answers under OpenTelemetry's names, and failures by their codes."""

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from corolla.telemetry.metrics import render


@pytest.fixture
def told(running):
    def read():
        families = text_string_to_metric_families(render(running.gateway.metrics.registry).decode())
        return {
            (sample.name, *(value for key, value in sorted(sample.labels.items()) if key != "gen_ai_provider_name")):
            sample.value
            for one in families for sample in one.samples
        }  # fmt: skip

    return read


def grown(before, after, *name):
    return after.get(name, 0) - before.get(name, 0)


def test_answers_are_counted_and_timed(running, client, told):
    before, model = told(), running.model
    asked = {"model": model, "messages": [{"role": "user", "content": "Count me"}], "max_tokens": 5, "temperature": 0}
    usage = client.chat.completions.create(**asked).usage
    for _ in client.chat.completions.create(**asked, stream=True):
        pass
    client.embeddings.create(model=model, input="abc")
    after = told()
    assert grown(before, after, "gen_ai_server_request_duration_seconds_count", "", "chat", model) == 2
    assert grown(before, after, "gen_ai_server_request_duration_seconds_count", "", "embeddings", model) == 1
    assert grown(before, after, "gen_ai_server_time_to_first_token_seconds_count", "chat", model) == 2
    assert grown(before, after, "gen_ai_server_time_per_output_token_seconds_count", "chat", model) == 2
    read = grown(before, after, "gen_ai_client_token_usage_tokens_sum", "chat", model, "input")
    written = grown(before, after, "gen_ai_client_token_usage_tokens_sum", "chat", model, "output")
    assert (read, written) == (2 * usage.prompt_tokens, 2 * usage.completion_tokens)
    assert grown(before, after, "corolla_gateway_cached_tokens_total", model) == usage.prompt_tokens - 1
    assert after["corolla_gateway_answers",] == 0
    assert after["corolla_gateway_kept_sessions",] >= 1


def test_what_fails_is_counted_by_its_code(running, client, told):
    before = told()
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(
            model=running.model, messages=[{"role": "user", "content": "a" * 5000}], max_tokens=5
        )
    name = ("gen_ai_server_request_duration_seconds_count", "context_too_long", "chat", running.model)
    assert grown(before, told(), *name) == 1

"""What cannot be answered is refused in OpenAI's words, with the right status, and never with a traceback."""

import json

import httpx
import pytest

from corolla.gateway import KeyConfig

HI = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.fixture
def http(running):
    with httpx.Client(
        base_url=running.url, headers={"Authorization": f"Bearer {running.key}"}, timeout=30, verify=False
    ) as http:
        yield http


def refused(response, status, code, field=None):
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (status, code, field), error
    assert error["message"]
    assert error["type"]
    assert "Traceback" not in response.text
    return error


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"temprature": 1}, "temprature"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "Hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "Hi", "audio": {}}]}, "messages[0].audio"),
        ({"messages": [*HI] * 1001}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 9000, "model": None}, "model"),
        ({"n": 17}, "n"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"128": 1}}, "logit_bias"),
        ({"store": True}, "store"),
        ({"metadata": {"a": "b"}}, "metadata"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "colour"}}}},
            "response_format",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}},
            "response_format",
        ),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"tools": [TOOL], "response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [TOOL | {"function": TOOL["function"] | {"strict": True}}]}, "tools"),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{"}}],
                    }
                ]
            },
            "messages[0].tool_calls",
        ),
    ],
)
def test_a_field_that_cannot_be_honoured_is_named(http, running, fields, field):
    said = {"model": running.model, "messages": HI, "max_tokens": 4} | fields
    for is_streamed in (False, True) if "stream_options" not in fields else (False,):
        refused(http.post("/v1/chat/completions", json=said | {"stream": is_streamed}), 400, "invalid_request", field)


def test_a_chat_that_is_too_long_is_refused(http, running):
    said = {"model": running.model, "messages": [{"role": "user", "content": "x" * 3000}]}
    error = refused(http.post("/v1/chat/completions", json=said), 400, "context_length_exceeded")
    assert "2048" in error["message"]
    said = {"model": running.model, "messages": HI, "max_tokens": 2040}
    refused(http.post("/v1/chat/completions", json=said), 400, "context_length_exceeded")
    refused(
        http.post("/v1/embeddings", json={"model": running.model, "input": "x" * 3000}), 400, "context_length_exceeded"
    )


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"[" * 100_000, b"\xff", b'{"model": "\\ud800"}'])
def test_what_is_no_json_is_refused(http, body):
    response = http.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_a_body_that_is_too_long_is_not_read(http):
    refused(http.post("/v1/chat/completions", content=b"x" * (5 << 20)), 413, "request_too_large")

    def endless():
        for _ in range(10):
            yield b"x" * (1 << 20)

    refused(http.post("/v1/chat/completions", content=endless()), 413, "request_too_large")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/embeddings"])
def test_a_model_that_is_not_offered_is_not_found(http, running, path):
    said = {"model": "another", "messages": HI, "prompt": "a", "input": "a"}
    wanted = {"/v1/chat/completions": "messages", "/v1/completions": "prompt", "/v1/embeddings": "input"}[path]
    error = refused(http.post(path, json={"model": "another", wanted: said[wanted]}), 404, "model_not_found")
    assert running.model in error["message"]


def test_what_completions_cannot_honour_is_refused(http, running):
    for fields, field in (
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt": [500]}, "prompt"),
        ({"echo": True, "logprobs": 1, "stream": True}, "stream"),
    ):
        said = {"model": running.model, "prompt": "a"} | fields
        refused(http.post("/v1/completions", json=said), 400, "invalid_request", field)
    said = {"model": running.model, "input": "a", "dimensions": 3}
    refused(http.post("/v1/embeddings", json=said), 400, "invalid_request", "dimensions")


def test_only_a_key_in_force_is_let_in(running):
    made = running.accounts.make(KeyConfig())
    running.accounts.revoke(made.id)
    for key in (None, "", "Basic abc", "Bearer ck-wrong", f"Bearer {made.text}"):
        headers = {} if key is None else {"Authorization": key}
        for path in ("/v1/models", "/v1/models/a"):
            response = httpx.get(running.url + path, headers=headers, verify=False)
            refused(response, 401, "invalid_api_key")
            assert response.headers["www-authenticate"] == "Bearer"
    assert httpx.get(f"{running.url}/health", verify=False).json() == {"status": "ok"}


def test_limits_of_a_key_say_when_to_come_back(running):
    said = {"model": running.model, "messages": HI, "max_tokens": 2}
    for config, code in (
        (KeyConfig(requests_per_min=1), "rate_limit_exceeded"),
        (KeyConfig(tokens_per_day=10), "insufficient_quota"),
    ):
        headers = {"Authorization": f"Bearer {running.accounts.make(config).text}"}
        with httpx.Client(base_url=running.url, headers=headers, verify=False) as http:
            statuses = [http.post("/v1/chat/completions", json=said) for _ in range(3)]
        assert statuses[0].status_code == 200
        error = refused(statuses[-1], 429, code)
        assert error["type"] == "rate_limit_error"
        assert int(statuses[-1].headers["retry-after"]) >= 1


def test_pages_and_methods_that_are_not_there(http):
    assert http.get("/v1/nothing").json()["error"]["type"] == "not_found_error"
    assert http.get("/v1/chat/completions").status_code == 405
    assert json.loads(http.get("/openapi.json").text)["info"]["title"] == "Corolla gateway"


def test_other_origins_are_not_allowed(http):
    response = http.options(
        "/v1/models", headers={"Origin": "https://example.org", "Access-Control-Request-Method": "GET"}
    )
    assert "access-control-allow-origin" not in response.headers

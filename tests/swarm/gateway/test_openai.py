"""The official OpenAI client against the gateway: each field of a request does what it says."""

import json
import math

import openai
import pytest

HI = [{"role": "user", "content": "Hi"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["days"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture
def chat(client, running):
    def ask(**fields):
        said = {"model": running.model, "messages": HI, "max_tokens": 8, "temperature": 0} | fields
        return client.chat.completions.create(**said)

    return ask


@pytest.fixture
def complete(client, running):
    def ask(**fields):
        said = {"model": running.model, "prompt": "abc", "max_tokens": 8, "temperature": 0} | fields
        return client.completions.create(**said)

    return ask


def text(answer):
    return answer.choices[0].message.content


def streamed(pieces):
    return "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)


def test_an_answer_says_what_it_cost_and_where_it_was_computed(chat, servers):
    answer = chat()
    assert text(answer)
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (19, 8, 27)
    told = answer.choices[0].corolla
    assert [(hop["peer"], hop["span"]) for hop in told["chain"]] == [
        (thread.peer_id, [*span]) for thread, span in zip(servers.servers, ((0, 2), (2, 4)), strict=True)
    ]
    assert told["tokens_per_s"] > 0
    assert told["replays"] == []


def test_a_header_says_where_the_time_went(client, running, servers):
    raw = client.chat.completions.with_raw_response.create(model=running.model, messages=HI, max_tokens=2)
    timing = raw.headers["server-timing"]
    assert f'hop;desc="{servers.servers[0].peer_id[:8]} 0:2";dur=' in timing
    assert 'replays;desc="0"' in timing


def test_a_stream_says_the_same(chat):
    whole = chat()
    pieces = list(chat(stream=True, stream_options={"include_usage": True}))
    assert pieces[0].choices[0].delta.role == "assistant"
    assert streamed(pieces) == text(whole)
    assert pieces[-2].choices[0].finish_reason == "length"
    assert len(pieces[-2].choices[0].corolla["chain"]) == 2
    assert pieces[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert pieces[-1].choices == []


def test_a_stream_tells_its_chain_on_the_way_if_asked(chat):
    pieces = list(chat(stream=True, extra_body={"stream_options": {"include_chain": True}}))
    told = [piece.choices[0].corolla for piece in pieces if hasattr(piece.choices[0], "corolla")]
    assert [hop["span"] for hop in told[0]["chain"]] == [[0, 2], [2, 4]]
    assert len(told) >= 2


def test_the_same_seed_says_the_same_and_another_does_not(chat):
    said = {seed: [text(chat(temperature=1.5, seed=seed, max_tokens=16)) for _ in range(2)] for seed in (1, 2)}
    assert said[1][0] == said[1][1] != said[2][0] == said[2][1]


def test_several_choices_differ_and_repeat_with_the_seed(chat):
    first, again = (chat(temperature=1.5, seed=5, n=3, max_tokens=16) for _ in range(2))
    said = [choice.message.content for choice in first.choices]
    assert len(set(said)) == 3
    assert said == [choice.message.content for choice in again.choices]
    assert first.usage.prompt_tokens == 19


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_stop_string_ends_an_answer_wherever_tokens_end(chat, is_streamed):
    whole = text(chat(max_tokens=24))
    stop = next(whole[at : at + 5] for at in range(8, 20))
    answer = chat(max_tokens=24, stop=[stop, "never said"], stream=is_streamed)
    said = streamed(answer) if is_streamed else text(answer)
    assert said == whole[: whole.index(stop)]


def test_log_probabilities_are_those_of_the_model(chat):
    answer = chat(logprobs=True, top_logprobs=3, max_tokens=4)
    tokens = answer.choices[0].logprobs.content
    assert "".join(one.token for one in tokens) == text(answer)
    for one in tokens:
        assert one.bytes == [*one.token.encode()]
        assert len(one.top_logprobs) == 3
        assert one.top_logprobs[0].token == one.token  # greedy
        assert one.top_logprobs[0].logprob == one.logprob <= 0
    assert chat().choices[0].logprobs is None


def test_biases_and_penalties_change_what_is_said(chat, complete):
    plain = text(chat(max_tokens=12))
    letter = plain[0]
    number = complete(prompt=letter, echo=True, logprobs=0, max_tokens=0).choices[0]
    assert number.logprobs.tokens == [letter]
    banned = text(chat(max_tokens=12, logit_bias={str(3 + ord(letter) - 32): -100}))
    assert letter not in banned
    assert len(set(text(chat(max_tokens=12, frequency_penalty=2, presence_penalty=2)))) > len(set(plain))
    assert text(chat(max_tokens=12, extra_body={"repetition_penalty": 5})) != plain
    assert text(chat(max_tokens=12, extra_body={"top_k": 1}, temperature=2)) == plain


def test_a_text_is_scored_as_evaluations_ask_it(complete):
    answer = complete(prompt="abcabc", echo=True, logprobs=2, max_tokens=1).choices[0]
    assert answer.text.startswith("abcabc")
    assert answer.logprobs.tokens[:6] == [*"abcabc"]
    assert answer.logprobs.token_logprobs[0] is None
    assert all(-math.inf < value <= 0 for value in answer.logprobs.token_logprobs[1:])
    assert len(answer.logprobs.token_logprobs) == 7
    assert answer.logprobs.text_offset[:7] == [*range(7)]
    follower = max(answer.logprobs.top_logprobs[-1], key=answer.logprobs.top_logprobs[-1].get)
    assert answer.logprobs.tokens[-1] == follower


def test_texts_and_tokens_are_continued_alike(complete):
    texts = complete(prompt=["abc", "xyz"], n=2)
    tokens = complete(prompt=[[3 + ord(letter) - 32 for letter in word] for word in ("abc", "xyz")], n=2)
    said = [choice.text for choice in texts.choices]
    assert said == [choice.text for choice in tokens.choices]
    assert said[0] == said[1] != said[2] == said[3]
    assert texts.usage.prompt_tokens == 6
    pieces = list(complete(prompt=["abc", "xyz"], stream=True))
    assert ["".join(p.choices[0].text for p in pieces if p.choices[0].index == index) for index in (0, 1)] == said[::2]


@pytest.mark.parametrize("is_streamed", [False, True])
def test_json_of_a_schema_is_enforced(chat, is_streamed):
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}, "size": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["colour", "size"],
        "additionalProperties": False,
    }
    asked = {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema, "strict": True}}
    for seed in range(3):
        answer = chat(response_format=asked, max_tokens=200, temperature=1, seed=seed, stream=is_streamed)
        said = json.loads(streamed(answer) if is_streamed else text(answer))
        assert said["colour"] in ("red", "blue")
        assert 0 <= said["size"] <= 99


def test_json_is_enforced(chat):
    said = text(chat(response_format={"type": "json_object"}, max_tokens=40, temperature=0))
    assert said.startswith("{")


def test_a_tool_that_must_be_called_is(chat):
    answer = chat(tools=[WEATHER], tool_choice="required", max_tokens=200, parallel_tool_calls=False).choices[0]
    (call,) = answer.message.tool_calls
    assert answer.finish_reason == "tool_calls"
    assert call.function.name == "weather"
    assert 1 <= json.loads(call.function.arguments)["days"] <= 9
    assert answer.message.content is None
    chat(
        messages=[
            *HI,
            {"role": "assistant", "tool_calls": [call.model_dump()]},
            {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
        ],
        tools=[WEATHER],
    )


def test_a_called_tool_is_streamed(chat):
    asked = {"type": "function", "function": {"name": "weather"}}
    pieces = list(
        chat(tools=[WEATHER], tool_choice=asked, max_tokens=200, parallel_tool_calls=False, stream=True, temperature=1)
    )
    calls = [call for piece in pieces for call in piece.choices[0].delta.tool_calls or []]
    assert [call.function.name for call in calls] == ["weather"]
    assert streamed(pieces) == ""
    assert pieces[-1].choices[0].finish_reason == "tool_calls"


def test_a_model_that_need_not_call_a_tool_may_talk(chat):
    for is_streamed in (False, True):
        answer = chat(tools=[WEATHER], stream=is_streamed)
        assert streamed(answer) if is_streamed else text(answer)


def test_texts_become_vectors(client, running):
    said = {"model": running.model, "input": ["abc", "abd", "xyz"]}
    plain = client.embeddings.create(**said, encoding_format="float")
    packed = client.embeddings.create(**said)  # as base64
    assert plain.usage.prompt_tokens == 9
    for one, other in zip(plain.data, packed.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding, abs=1e-3)
        assert sum(x * x for x in one.embedding) == pytest.approx(1, abs=1e-3)


def test_the_models_are_listed(client, running):
    (model,) = client.models.list().data
    assert model.id == running.model
    assert client.models.retrieve(running.model).corolla["context_tokens"] == 2048
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")

"""Sessions are kept between turns, each for its owner, and given up when nobody wants them any more."""

import threading
import time
from contextlib import ExitStack

import httpx
import pytest

from corolla.client import Session
from corolla.gateway import KeyConfig

WAIT_S = 20.0


@pytest.fixture
def sent(monkeypatch):
    """How many tokens each step of any session has sent."""
    counts, step = [], Session.step

    async def counted(self, tokens, **more):
        counts.append(len(tokens.hidden_ND))
        return await step(self, tokens, **more)

    monkeypatch.setattr(Session, "step", counted)
    return counts


def ask(client, running, messages, **more):
    said = {"model": running.model, "messages": messages, "max_tokens": 6, "temperature": 0} | more
    return client.chat.completions.create(**said)


def eventually(is_so):
    until_s = time.monotonic() + WAIT_S
    while not is_so() and time.monotonic() < until_s:
        threading.Event().wait(0.02)
    assert is_so()


def test_a_turn_sends_only_what_is_new(client, running, sent):
    messages = [{"role": "user", "content": "tell me a long story " * 4}]
    first = ask(client, running, messages)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert sent[0] == first.usage.prompt_tokens
    sent.clear()
    messages += [{"role": "assistant", "content": first.choices[0].message.content}, {"role": "user", "content": "on"}]
    turn = ask(client, running, messages)
    new = turn.usage.prompt_tokens - turn.usage.prompt_tokens_details.cached_tokens
    assert sent[0] == new < 40 < first.usage.prompt_tokens
    assert sent[1:] == [1] * (len(sent) - 1)
    sent.clear()
    again = ask(client, running, messages)  # as when an answer is made anew
    assert sent[0] == 1
    assert again.choices[0].message.content == turn.choices[0].message.content


def test_a_session_between_turns_remembers_no_steps(client, running, monkeypatch):
    sessions, step = [], Session.step

    async def noted(self, tokens, **more):
        sessions.append(self)
        return await step(self, tokens, **more)

    monkeypatch.setattr(Session, "step", noted)
    messages = [{"role": "user", "content": "what grows with every step?"}]
    ask(client, running, messages)
    ask(client, running, messages)
    assert len(sessions) == 12
    assert len({id(session) for session in sessions}) == 1
    assert not sessions[0].trace.entries


def test_nobody_goes_on_with_the_session_of_another_key(client, running, sent):
    messages = [{"role": "user", "content": "a secret " * 5}]
    ask(client, running, messages)
    sent.clear()
    other = running.client().with_options(api_key=running.accounts.make(KeyConfig()).text)
    with other:
        answer = ask(other, running, messages)
    assert sent[0] == answer.usage.prompt_tokens


def test_two_chats_at_once_do_not_share_a_session(client, running, at_once):
    messages = [{"role": "user", "content": "both the same " * 3}]
    alone = ask(client, running, messages, max_tokens=20).choices[0].message.content
    answers = at_once(lambda _: ask(client, running, messages, max_tokens=20), range(8))
    assert {answer.choices[0].message.content for answer in answers} == {alone}


@pytest.mark.parametrize("is_streamed", [False, True])
def test_pages_are_free_again_when_the_client_goes_away(running, servers, is_streamed):
    running.gateway.kept.drop_all()
    said = {
        "model": running.model,
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 1900,
        "logit_bias": {"2": -100},  # never ends by itself
        "stream": is_streamed,
    }
    free = [thread.server.load.free_tokens for thread in servers.servers]
    with (
        httpx.Client(base_url=running.url, headers={"Authorization": f"Bearer {running.key}"}, verify=False) as http,
        ExitStack() as stack,
    ):
        if is_streamed:
            answer = stack.enter_context(http.stream("POST", "/v1/chat/completions", json=said, timeout=30))
            lines = answer.iter_lines()
            while '"content":"' not in next(lines):
                pass
        else:
            with pytest.raises(httpx.ReadTimeout):
                http.post("/v1/chat/completions", json=said, timeout=1.0)
        assert [thread.server.load.sessions for thread in servers.servers] == [1, 1]
    eventually(lambda: [thread.server.load.sessions for thread in servers.servers] == [0, 0])
    assert [thread.server.load.free_tokens for thread in servers.servers] == free
    spent = next(one for one in running.accounts.all() if one.name == "test")
    assert spent.written_tokens > 0


def test_fifty_streams_at_once_all_end(client, running, at_once):
    def stream(index):
        messages = [{"role": "user", "content": f"chat {index}"}]
        pieces = list(ask(client, running, messages, stream=True, temperature=1, seed=index, max_tokens=12))
        return pieces[-1].choices[0].finish_reason, "".join(piece.choices[0].delta.content or "" for piece in pieces)

    said = at_once(stream, range(50))
    assert {reason for reason, _ in said} <= {"length", "stop"}
    assert all(text for _, text in said)
    assert [stream(index) for index in (0, 25, 49)] == [said[index] for index in (0, 25, 49)]
    assert len(running.gateway.kept) == running.gateway.config.kept_sessions

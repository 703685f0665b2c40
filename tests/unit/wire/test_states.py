"""The session's table: what may follow what, and what a step may say."""

import pytest

from corolla.errors import LocalProtocolError, RemoteProtocolError, SessionClosed
from corolla.terms import ModelId, Span
from corolla.wire import (
    Ack,
    Closed,
    CloseSession,
    Done,
    Failure,
    OpenSession,
    Output,
    SessionOpened,
    SessionState,
    Step,
    TensorMeta,
    Timing,
)
from corolla.wire.states import TABLE


def hidden(tokens):
    return TensorMeta("raw", "float32", (tokens, 8), tokens * 32)


def step(starts, counts, **more):
    return Step(starts=starts, counts=counts, hidden=hidden(sum(counts)), **more)


OPEN = OpenSession(model=ModelId("0" * 64), span=Span(0, 4), rows=2, max_tokens=64, codec="raw")
OPENED = SessionOpened(lease_s=30.0)
STEP = step((0, 0), (3, 1))
OUTPUT = Output(tensors=(hidden(4),), timing=Timing(0.0, 0.0))
DONE = Done(timing=Timing(0.0, 0.0))
FAILURE = Failure(code="cache_full", message="no room")
MESSAGES = (OPEN, OPENED, STEP, OUTPUT, DONE, CloseSession(), Closed(), FAILURE, Ack())
WAYS = {
    "idle": (),
    "opening": (OPEN,),
    "open": (OPEN, OPENED),
    "stepping": (OPEN, OPENED, STEP),
    "closing": (OPEN, OPENED, CloseSession()),
}


def session(way):
    state = SessionState()
    for message in way:
        state.sent(message)
    return state


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_each_state_takes_the_messages_of_the_table_and_no_others(name, message):
    state = session(WAYS[name])
    assert state.state == name
    following = TABLE.get((name, type(message)))
    if following is not None:
        state.received(message)
        assert state.state == following
        return
    with pytest.raises(RemoteProtocolError, match=type(message).__name__):
        state.received(message)
    with pytest.raises((LocalProtocolError, SessionClosed)):
        session(WAYS[name]).sent(message)
    assert state.state == name


def test_tokens_count_once_they_are_answered():
    state = session((OPEN, OPENED, STEP))
    assert state.lengths == [0, 0]
    state.received(OUTPUT)
    assert state.lengths == [3, 1]
    state.sent(step((1, 1), (1, 0)))
    state.received(FAILURE)
    assert state.lengths == [3, 1]
    state.sent(step((1, 1), (1, 0)))
    state.received(OUTPUT)
    assert state.lengths == [2, 1]


def test_an_order_is_applied_before_the_starts():
    state = session((OPEN, OPENED, STEP, OUTPUT))
    state.sent(step((3, 3), (1, 1), order=(0, 0)))
    state.received(OUTPUT)
    assert state.lengths == [4, 4]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (step((0,), (1,)), "1 rows in a session of 2"),
        (step((0, 0, 0), (1, 1, 1)), "3 rows"),
        (step((4, 0), (1, 1)), "position 4 of row 0, which has 3"),
        (step((0, 2), (1, 1)), "position 2 of row 1, which has 1"),
        (step((0, 2), (1, 1), order=(0, 1)), "row 1"),
        (step((0, 0), (1, 1), order=(0,)), "order"),
        (step((0, 0), (1, 1), order=(0, 2)), "order"),
        (Step(starts=(0, 0), counts=(1, 1), hidden=hidden(3)), "2 tokens with a tensor"),
        (Step(starts=(0, 0), counts=(1, 1), hidden=TensorMeta("raw", "float32", (2,), 8)), "2 tokens with a tensor"),
    ],
)
def test_a_step_that_does_not_fit_is_refused_and_changes_nothing(wrong, words):
    state = session((OPEN, OPENED, STEP, OUTPUT))
    with pytest.raises(RemoteProtocolError, match=words):
        state.received(wrong)
    assert (state.state, state.lengths) == ("open", [3, 1])


def test_a_step_after_the_end_is_the_callers_mistake():
    with pytest.raises(SessionClosed):
        session(()).sent(STEP)

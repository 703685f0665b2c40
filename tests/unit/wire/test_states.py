"""The session's table: what may follow what, and what a step may say."""

import pytest

from corolla.errors import LocalProtocolError, RemoteProtocolError, SessionClosed
from corolla.terms import ModelId, PeerId, Span
from corolla.wire import (
    Ack,
    Closed,
    CloseSession,
    Done,
    Expect,
    Failure,
    Feed,
    HandedOver,
    HandOver,
    Leaving,
    OpenSession,
    Output,
    Ping,
    Redirect,
    Redirected,
    Restore,
    Restored,
    Resume,
    SessionOpened,
    SessionState,
    Step,
    Successor,
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
FEED = Feed(token=bytes(16))
NEXT = Successor(PeerId("a" * 52), (), bytes(16), False)
NEWS = (
    Expect(token=bytes(16)),
    Redirect(successor=NEXT),
    Redirected(),
    Resume(key=bytes(16), done=3),
    Leaving(left_s=30.0),
    HandOver(heir=NEXT),
    HandedOver(),
    Restore(row=0, start=0, tensors=(hidden(4), hidden(4))),
    Restored(lengths=(3, 1), number=1),
)
MESSAGES = (OPEN, OPENED, STEP, OUTPUT, DONE, *NEWS, FEED, CloseSession(), Closed(), FAILURE, Ack(), Ping())
OPENING = (("client", OPEN), ("server", OPENED))
WAYS = {
    "idle": (),
    "opening": OPENING[:1],
    "open": OPENING,
    "closing": (*OPENING, ("client", STEP), ("client", CloseSession())),
    "joining": (("client", FEED),),
    "feeding": (("client", FEED), ("server", Ack())),
}


def session(way, side="client"):
    """A side's state after a conversation."""
    state = SessionState(side)
    for says, message in way:
        (state.sent if says == side else state.received)(message)
    return state


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("says", ["client", "server"])
@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_each_state_takes_the_messages_of_the_table_and_no_others(name, says, message):
    other = "server" if says == "client" else "client"
    here, there = session(WAYS[name], says), session(WAYS[name], other)
    assert here.state == there.state == name
    here.rows = there.rows = 2
    following = TABLE.get((name, says, type(message)))
    if following is not None:
        here.sent(message)
        there.received(message)
        assert here.state == there.state == following
        return
    with pytest.raises(RemoteProtocolError, match=type(message).__name__):
        there.received(message)
    with pytest.raises((LocalProtocolError, SessionClosed)):
        here.sent(message)
    assert here.state == there.state == name


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (step((0,), (1,)), "1 rows in a session of 2"),
        (step((0, 0, 0), (1, 1, 1)), "3 rows"),
        (step((0, 0), (1, 1), order=(0,)), "order"),
        (step((0, 0), (1, 1), order=(0, 2)), "order"),
        (Step(starts=(0, 0), counts=(1, 1), hidden=hidden(3)), "2 tokens with a tensor"),
        (Step(starts=(0, 0), counts=(1, 1), hidden=TensorMeta("raw", "float32", (2,), 8)), "2 tokens with a tensor"),
    ],
)
@pytest.mark.parametrize(("name", "side"), [("open", "server"), ("open", "client"), ("feeding", "server")])
def test_a_step_that_does_not_fit_is_refused_and_changes_nothing(name, side, wrong, words):
    state = session(WAYS[name], side)
    state.rows = 2
    with pytest.raises(RemoteProtocolError, match=words):
        state.received(wrong)
    assert state.state == name


def test_lengths_of_other_rows_than_the_sessions_are_refused():
    state = session(WAYS["feeding"], "server")
    state.rows = 2
    with pytest.raises(RemoteProtocolError, match="the lengths of 1 rows in a session of 2"):
        state.received(Restored(lengths=(3,), number=1))


def test_a_step_after_the_end_is_the_callers_mistake():
    with pytest.raises(SessionClosed):
        session(WAYS["closing"]).sent(STEP)

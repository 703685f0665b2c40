"""Whatever the bytes, they decode or raise an error of the protocol; whatever the message, it comes back as it was."""

import contextlib

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from corolla.errors import Error, FrameTooLarge, PeerOutdated, RemoteProtocolError, revive
from corolla.terms import Span
from corolla.wire import (
    PROTOCOL_VERSION,
    Accept,
    Ack,
    Backward,
    Closed,
    CloseSession,
    Connect,
    Connected,
    DialBack,
    DialedBack,
    Done,
    Expect,
    Failure,
    Feed,
    Forward,
    FrameDecoder,
    Gradients,
    Greeting,
    HandedOver,
    HandOver,
    Incoming,
    Leaving,
    Load,
    Message,
    News,
    Observe,
    Observed,
    OpenSession,
    Output,
    Ping,
    Pong,
    Publish,
    Punch,
    Punched,
    ReachMessage,
    Record,
    Redirect,
    Redirected,
    Reserve,
    Reserved,
    Restore,
    Restored,
    Resume,
    SessionOpened,
    SessionState,
    Step,
    Subscribe,
    Successor,
    Suspicion,
    TensorMeta,
    Timing,
    decode_message,
    encode_frame,
    encode_message,
    split_payload,
)
from corolla.wire.states import TABLE

COUNT = st.integers(0, 2**53)
WHOLE = st.integers(-(2**63), 2**64 - 1)  # those that MessagePack knows
TOKENS = st.integers(0, 1 << 20)
SECONDS = st.floats(0, 1e9)
NAME = st.text(max_size=32)
MODEL = st.text("0123456789abcdef", min_size=64, max_size=64)
SPAN = st.builds(lambda start, size: Span(start, start + size), st.integers(0, 4000), st.integers(1, 96))
SHAPE = st.lists(st.integers(1, 2**31 - 1), min_size=1, max_size=4).map(tuple)
TENSOR = st.builds(TensorMeta, NAME, st.sampled_from(["float32", "bfloat16", "float16"]), SHAPE, COUNT)
TIMING = st.builds(Timing, SECONDS, SECONDS)
LOAD = st.builds(Load, COUNT, COUNT)
PEER = st.text("abcdefghijklmnopqrstuvwxyz234567", min_size=52, max_size=52)
SIGNATURE = st.binary(min_size=64, max_size=64)
KEY = st.binary(min_size=32, max_size=32)
RECORD = st.builds(Record, st.binary(max_size=64), SIGNATURE, SECONDS, st.none() | st.binary(max_size=64))
SUSPICION = st.builds(Suspicion, KEY, COUNT, KEY, SIGNATURE)
IDS = st.binary(max_size=64)


TICKET = st.binary(min_size=16, max_size=16)
KNOCKS = st.lists(NAME, max_size=2).map(tuple)


def some(element, least=0):
    return st.lists(element, min_size=least, max_size=4).map(tuple)


def tensors(least, most=4):
    return st.lists(TENSOR, min_size=least, max_size=most).map(tuple)


TOKEN = st.binary(min_size=16, max_size=16)
SUCCESSOR = st.builds(Successor, PEER, some(st.text(max_size=16)), TOKEN, st.booleans())
RAW = st.none() | st.binary(max_size=16)
RUN = {"model": MODEL, "span": SPAN, "codec": NAME, "attention_mask": RAW, "position_ids": RAW, "taps": some(COUNT)}
PLAIN = (Ack, Redirected, Ping, Pong, CloseSession, Closed, Subscribe, Observe, Reserve, Reserved, Connected)
MESSAGES = {
    **{kind: st.builds(kind) for kind in PLAIN},
    Failure: st.builds(
        Failure, code=NAME, message=st.text(max_size=64), retry_after_s=st.none() | SECONDS, number=COUNT
    ),
    Greeting: st.builds(
        Greeting, proof=st.binary(max_size=512), number=st.integers(-1, 2**53), revoked=st.none() | st.binary()
    ),
    OpenSession: st.builds(
        OpenSession,
        model=MODEL,
        span=SPAN,
        rows=st.integers(1, 1024),
        max_tokens=st.integers(1, 1 << 20),
        codec=NAME,
        token=st.none() | TOKEN,
        successor=st.none() | SUCCESSOR,
        key=st.none() | TOKEN,
    ),
    SessionOpened: st.builds(SessionOpened, lease_s=SECONDS, taken=COUNT),
    Resume: st.builds(Resume, key=TOKEN, done=COUNT),
    Leaving: st.builds(Leaving, left_s=SECONDS),
    HandOver: st.builds(HandOver, heir=SUCCESSOR),
    HandedOver: st.builds(HandedOver, problem=st.text(max_size=64)),
    Restore: st.builds(Restore, row=st.integers(0, 1023), start=TOKENS, tensors=tensors(2), logged=st.none() | TENSOR),
    Restored: st.builds(Restored, lengths=some(TOKENS, 1), number=COUNT),
    Step: st.builds(
        Step,
        starts=some(TOKENS, 1),
        counts=some(TOKENS, 1),
        hidden=TENSOR,
        order=st.none() | some(st.integers(0, 1023)),
        taps=some(COUNT),
        number=COUNT,
        settled=COUNT,
    ),
    Output: st.builds(Output, tensors=tensors(1), timing=TIMING, number=COUNT, load=st.none() | LOAD),
    Done: st.builds(Done, timing=TIMING, number=COUNT, load=st.none() | LOAD),
    Expect: st.builds(Expect, token=TOKEN),
    Redirect: st.builds(Redirect, successor=SUCCESSOR),
    Feed: st.builds(Feed, token=TOKEN),
    Forward: st.builds(Forward, hidden=TENSOR, **RUN),
    Backward: st.builds(Backward, tensors=tensors(2), **RUN),
    Gradients: st.builds(Gradients, tensors=tensors(1, 1), timing=TIMING),
    News: st.builds(
        News,
        ids=IDS,
        wanted=IDS,
        bodies=IDS,
        gone=IDS,
        records=some(RECORD),
        suspicions=some(SUSPICION),
        sums=IDS,
        listing=st.none() | st.dictionaries(st.integers(0, 1023), IDS, max_size=3),
        is_last=st.booleans(),
    ),
    Publish: st.builds(Publish, records=some(RECORD), suspicions=some(SUSPICION), is_whole=st.booleans()),
    Observed: st.builds(Observed, host=st.text(max_size=64), port=st.integers(0, 65535), unix_s=SECONDS),
    DialBack: st.builds(DialBack, port=st.integers(1, 65535)),
    DialedBack: st.builds(DialedBack, address=NAME, is_reached=st.booleans(), problem=NAME),
    Incoming: st.builds(Incoming, ticket=TICKET, peer=PEER),
    Connect: st.builds(Connect, peer=PEER),
    Accept: st.builds(Accept, ticket=TICKET),
    Punch: st.builds(Punch, addresses=KNOCKS),
    Punched: st.builds(Punched, addresses=KNOCKS),
}
ANY = st.one_of(*MESSAGES.values())
FRAME = st.tuples(
    st.binary(max_size=200), st.lists(st.binary(max_size=200), max_size=3), st.none() | st.floats(0.001, 4e6)
)
PROTOCOL_ERRORS = (RemoteProtocolError, PeerOutdated, FrameTooLarge)


def test_there_is_a_strategy_for_every_message():
    assert set(MESSAGES) == {*Message.__subclasses__(), *ReachMessage.__subclasses__()} - {ReachMessage}


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
def test_every_message_comes_back_as_it_was(kind):
    @given(MESSAGES[kind])
    def check(message):
        assert decode_message(encode_message(message)) == message

    check()


@given(st.binary(max_size=300))
@example(b"\xc1")
@example(b"\x91" * 5000)
@example(b"\xdb\xff\xff\xff\xff")
def test_any_bytes_are_a_message_or_an_error_of_the_peer(data):
    with contextlib.suppress(RemoteProtocolError):
        decode_message(data)


@given(ANY, st.data())
def test_a_damaged_message_is_a_message_or_an_error_of_the_peer(message, data):
    damaged = bytearray(encode_message(message))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(RemoteProtocolError):
        assert isinstance(decode_message(bytes(damaged)), Message)


@given(ANY, st.dictionaries(st.text(max_size=8), st.none() | WHOLE | st.text(max_size=8), max_size=3))
def test_what_a_newer_peer_adds_is_passed_over(message, additions):
    fields = msgspec.msgpack.decode(encode_message(message))
    known = {field.name for field in msgspec.structs.fields(type(message))} | {"type"}
    more = {name: value for name, value in additions.items() if name not in known}
    assert decode_message(msgspec.msgpack.encode({**fields, **more})) == message


@given(st.lists(FRAME, max_size=5), st.data())
def test_frames_are_the_same_however_they_are_cut(frames, data):
    stream = b"".join(b"".join(encode_frame(message, parts, deadline_s=limit)) for message, parts, limit in frames)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=20)))
    decoder, found = FrameDecoder(), []
    for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        found += decoder.receive(stream[start:stop])
    assert decoder.is_between_frames
    assert len(found) == len(frames)
    for frame, (message, parts, limit) in zip(found, frames, strict=True):
        assert (frame.message, bytes(frame.payload)) == (message, b"".join(parts))
        assert frame.deadline_s == (None if limit is None else pytest.approx(limit, abs=0.001))


@given(st.lists(st.binary(max_size=100), max_size=5), st.booleans())
def test_any_bytes_are_frames_or_an_error_of_the_protocol(pieces, is_half_right):
    decoder = FrameDecoder()
    try:
        if is_half_right:
            list(decoder.receive(b"CRLA\x01"))
        for piece in pieces:
            list(decoder.receive(piece))
    except PROTOCOL_ERRORS:
        pass


@given(FRAME, st.data())
def test_a_frame_that_is_cut_short_is_never_given(frame, data):
    message, parts, limit = frame
    stream = b"".join(encode_frame(message, parts, deadline_s=limit))
    decoder = FrameDecoder()
    keep = data.draw(st.integers(0, len(stream) - 1))
    assert list(decoder.receive(stream[:keep])) == []
    assert decoder.is_between_frames == (keep == 0)


@given(st.integers(0, 255).filter(lambda version: version != PROTOCOL_VERSION), st.binary(max_size=40))
def test_another_version_is_told_from_nonsense(version, rest):
    with pytest.raises(PeerOutdated, match=str(version)):
        list(FrameDecoder().receive(b"CRLA" + bytes([version]) + rest))


@given(st.binary(max_size=64), st.lists(st.integers(0, 64), max_size=5))
def test_a_payload_is_cut_as_described_or_not_at_all(payload, sizes):
    try:
        parts = split_payload(memoryview(payload), sizes)
    except RemoteProtocolError:
        assert sum(sizes) != len(payload)
    else:
        assert [len(part) for part in parts] == sizes
        assert b"".join(parts) == payload


@given(st.sampled_from(["client", "server"]), st.lists(st.tuples(st.booleans(), ANY), max_size=40))
def test_no_messages_lead_out_of_the_sessions_table(side, messages):
    other = "server" if side == "client" else "client"
    session = SessionState(side)
    for is_sent, message in messages:
        before = session.state
        try:
            (session.sent if is_sent else session.received)(message)
        except Error:
            assert session.state == before
        else:
            assert session.state == TABLE[before, side if is_sent else other, type(message)]


@given(NAME, st.text(max_size=64), st.none() | SECONDS)
def test_any_reported_failure_can_be_raised(code, text, retry_after_s):
    error = Failure(code=code, message=text, retry_after_s=retry_after_s).error("a" * 52)
    assert isinstance(error, Error)
    assert error.message == text
    assert type(revive(error.code, text, peer="a" * 52)) is type(error)

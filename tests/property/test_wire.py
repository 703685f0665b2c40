"""Whatever the bytes, they decode or raise an error of the protocol; whatever the message, it comes back as it was."""

import contextlib

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from corolla.errors import Error, FrameTooLarge, PeerOutdated, RemoteProtocolError, revive
from corolla.wire import (
    PROTOCOL_VERSION,
    Failure,
    FrameDecoder,
    Message,
    ReachMessage,
    SessionState,
    decode_message,
    encode_frame,
    encode_message,
    split_payload,
)
from corolla.wire.shelves import ShelfMessage
from corolla.wire.states import TABLE

from .messages import MESSAGES, NAME, SECONDS, WHOLE

ANY = st.one_of(*MESSAGES.values())
FRAME = st.tuples(
    st.binary(max_size=200), st.lists(st.binary(max_size=200), max_size=3), st.none() | st.floats(0.001, 4e6)
)
PROTOCOL_ERRORS = (RemoteProtocolError, PeerOutdated, FrameTooLarge)


def test_there_is_a_strategy_for_every_message():
    roots = {ReachMessage, ShelfMessage}
    below = {kind for root in roots for kind in root.__subclasses__()}
    assert set(MESSAGES) == {*Message.__subclasses__(), *below} - roots


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

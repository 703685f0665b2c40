"""Whatever others say, in whatever pieces and order, costs them their own stream alone: the server serves the next."""

import contextlib

import anyio
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from corolla.client import Session, StepTokens, Target
from corolla.codec import encode
from corolla.errors import Error, PeerBusy, PeerError
from corolla.swarm import Channel
from corolla.terms import ModelId, Span
from corolla.wire import (
    PROTOCOL_VERSION,
    Failure,
    Feed,
    OpenSession,
    Output,
    Restore,
    Restored,
    SessionOpened,
    Step,
    encode_frame,
    encode_message,
)

from ...property.messages import MESSAGES

WIDTH = 64
OPENING = OpenSession(
    model="ab" * 32, span=Span(0, 4), rows=1, max_tokens=32, codec="raw", token=b"t" * 16, key=b"k" * 16
)


def step(start=0, number=1, tokens=2):
    encoded = encode(torch.ones(tokens, WIDTH), "raw")
    message = Step(starts=(start,), counts=(tokens,), hidden=encoded.meta, number=number)
    return framed(message, encoded.buffers)


def framed(message, payload=()):
    return b"".join(map(bytes, encode_frame(encode_message(message), payload)))


ANY_MESSAGE = st.one_of([*MESSAGES.values()])
FRAMES = st.one_of(
    st.just(framed(OPENING)),
    st.builds(step, st.integers(0, 4), st.integers(0, 4)),
    st.builds(lambda message, payload: framed(message, [payload]), ANY_MESSAGE, st.binary(max_size=600)),
    st.builds(lambda body: b"".join(encode_frame(body)), st.binary(max_size=64)),
    st.binary(max_size=64),
    st.builds(lambda head: b"CRLA%c" % PROTOCOL_VERSION + head, st.binary(min_size=15, max_size=40)),
    st.builds(lambda version: b"CRLA%c" % version + bytes(15), st.integers(0, 255)),
)


@st.composite
def conversations(draw):
    """What one peer sends on a stream: frames, perhaps cut, doubled or swapped, in pieces; and how it ends."""
    sent = draw(st.lists(FRAMES, min_size=1, max_size=6))
    if draw(st.booleans()):
        sent.insert(0, framed(OPENING))
    whole = b"".join(sent)
    stop = draw(st.just(len(whole)) | st.integers(0, len(whole)))
    cuts = sorted(draw(st.lists(st.integers(0, stop), max_size=4)))
    pieces = [whole[start:end] for start, end in zip([0, *cuts], [*cuts, stop], strict=True)]
    return [piece for piece in pieces if piece], draw(st.sampled_from(["end", "close", "break", "listen"]))


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(talks=st.lists(conversations(), min_size=4, max_size=12))
def test_whatever_peers_say_the_server_goes_on(hosts, talks):
    anyio.run(withstand, type(hosts)(), talks)


async def withstand(hosts, talks):
    async with hosts.host(resume_s=0.05, lease_s=0.3) as host, hosts.endpoint() as rude, hosts.channel(host) as channel:
        with anyio.fail_after(30):
            async with anyio.create_task_group() as tasks:
                for pieces, ending in talks:
                    tasks.start_soon(say, hosts.network, rude, host, pieces, ending)
            await check_serves(channel)
            while host.engine.load.sessions:  # noqa: ASYNC110
                await anyio.sleep(0.01)
        host.engine.check_integrity()


async def say(network, rude, host, pieces, ending):
    stream = await rude._dial(host.peer, host.endpoint.addresses)
    try:
        with contextlib.suppress(anyio.BrokenResourceError, anyio.ClosedResourceError, anyio.EndOfStream):
            for piece in pieces:
                await stream.send(piece)
            if ending == "end":
                await stream.send_eof()
            elif ending == "break":
                stream.break_now()
            with anyio.move_on_after(0.05 if ending == "listen" else 0):
                while True:
                    await stream.receive()
    finally:
        await stream.aclose()


async def check_serves(channel):
    """An honest client gets what it always gets."""
    opening = OpenSession(model="ab" * 32, span=Span(0, 4), rows=1, max_tokens=32, codec="raw")
    await channel.request(opening, expected=SessionOpened, deadline_s=10)
    encoded = encode(torch.ones(2, WIDTH), "raw")
    message = Step(starts=(0,), counts=(2,), hidden=encoded.meta, number=1)
    answer = await channel.request(message, encoded.buffers, expected=Output, deadline_s=10)
    assert answer.message.tensors[0].shape == (2, WIDTH)
    await channel.aclose()


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(answers=st.lists(st.tuples(ANY_MESSAGE, st.binary(max_size=300)), min_size=1, max_size=6))
def test_whatever_a_server_answers_the_client_gets_an_error_or_goes_on_elsewhere(hosts, answers):
    anyio.run(endure, type(hosts)(), answers)


async def endure(hosts, answers):
    left = [*answers]

    async def answer(channel, message):
        if isinstance(message, OpenSession) and len(left) == len(answers):
            await channel.send(SessionOpened(lease_s=60.0))
        if left:
            said, payload = left.pop()
            await channel.send(said, [payload])

    async with (
        hosts.host("0:4", answer=answer) as liar,
        hosts.host("0:4"),
        hosts.swarm(attempts=8, open_s=0.2, step_s=0.2, chain_s=1.0) as swarm,
    ):
        swarm.blame(next(host.peer for host in hosts.all if host is not liar), PeerError("not yet"))
        session = Session(swarm, Target(ModelId("ab" * 32), Span(0, 4), "raw"), rows=1, max_tokens=64)
        with anyio.fail_after(20):
            with contextlib.suppress(Error):  # and nothing else
                await session.open()
                result = await session.step(StepTokens(torch.ones(2, WIDTH), (0,), (2,)))
                assert result.hidden_ND.shape == (2, WIDTH)
            await session.close()


@pytest.mark.anyio
async def test_a_hop_that_feeds_the_next_what_are_no_numbers_is_left(hosts, until):
    async with hosts.chain("0:2", "2:4") as (liar, _), hosts.host("0:2") as honest, hosts.swarm() as swarm:
        await honest.announce(state="draining")
        await until(lambda: "draining" in {one.state for one in swarm.snapshot().announcements})
        session = Session(swarm, Target(ModelId("ab" * 32), Span(0, 4), "raw"), rows=1, max_tokens=64)
        await session.open()
        await honest.announce()
        await until(lambda: {one.state for one in swarm.snapshot().announcements} == {"online"})
        (served,) = liar.handler._sessions
        send_on = served._send_on
        served._send_on = lambda feed, step, output_ND, limit_s: send_on(feed, step, output_ND * torch.nan, limit_s)
        await session.step(StepTokens(torch.ones(2, WIDTH), (0,), (2,)))
        assert session.chain.hops[0].peer == honest.peer
        assert swarm._bans.banned(0.0) == {liar.peer}
        await session.close()


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ([torch.ones(2, 3, 16)] * 2, "are not keys and values of blocks 0:4 here"),
        ([torch.ones(2, 3, 16)] * 8, "are not keys and values of blocks 0:4 here"),
        ([torch.ones(4, 40, 16, dtype=torch.bfloat16)] * 8, "are not keys and values"),
        ([torch.ones(64)] * 8, "are not keys and values"),
    ],
)
async def test_keys_and_values_that_do_not_fit_end_the_session_they_were_for(hosts, until, tensors, words):
    async with hosts.host() as host, hosts.channel(host) as client, hosts.channel(host) as feeder:
        await client.request(OPENING, expected=SessionOpened, deadline_s=5)
        await feeder.send(Feed(token=b"t" * 16))
        await feeder.receive()
        encoded = [encode(tensor, "raw") for tensor in tensors]
        restore = Restore(row=0, start=0, tensors=tuple(one.meta for one in encoded))
        await feeder.send(restore, [buffer for one in encoded for buffer in one.buffers])
        said = await client.receive(deadline_s=5)
        assert isinstance(said.message, Failure)
        assert words in said.message.message
        await until(lambda: host.engine.load.sessions == 0)
        host.engine.check_integrity()
        await client.aclose()
        await feeder.aclose()


@pytest.mark.anyio
async def test_lengths_that_nobody_has_end_the_session_they_were_for(hosts, until):
    async with hosts.host() as host, hosts.channel(host) as client, hosts.channel(host) as feeder:
        await client.request(OPENING, expected=SessionOpened, deadline_s=5)
        await feeder.send(Feed(token=b"t" * 16))
        await feeder.receive()
        await feeder.send(Restored(lengths=(30,), number=7))
        said = await client.receive(deadline_s=5)
        assert "cannot be shortened" in said.message.message
        await until(lambda: host.engine.load.sessions == 0)
        await client.aclose()
        await feeder.aclose()


@pytest.mark.anyio
async def test_what_a_peer_begins_and_does_not_finish_is_bounded(hosts):
    async with hosts.host() as host, hosts.endpoint() as rude:
        object.__setattr__(host.endpoint.config, "max_bytes_per_peer", 5 << 20)
        whole = framed(Step(starts=(0,), counts=(9,), hidden=encode(torch.ones(9, 9), "raw").meta), [bytes(8 << 20)])
        streams = [await rude._dial(host.peer, host.endpoint.addresses) for _ in range(3)]
        with anyio.fail_after(10):
            await streams[0].send(whole[: 3 << 20])
            await streams[1].send(whole[: 3 << 20])
            with pytest.raises(PeerBusy, match="5242880 is the limit for one peer"):
                raise (await Channel(streams[1]).receive()).message.error(host.peer)
        async with hosts.channel(host) as channel:  # and others are not concerned
            await check_serves(channel)
        for stream in streams:
            await stream.aclose()


@pytest.mark.anyio
async def test_a_client_that_takes_nothing_is_given_up_and_the_others_are_not(hosts, until):
    async with hosts.host() as host, hosts.endpoint() as slow:
        object.__setattr__(host.handler._outlet, "step_s", 0.2)
        stream = await slow._dial(host.peer, host.endpoint.addresses)
        await stream.send(framed(OPENING))
        for number in range(1, 9):
            await stream.send(step(start=0, number=number, tokens=250 if number > 1 else 2)[: 1 << 20])
        async with hosts.channel(host) as channel:
            await check_serves(channel)
        await stream.aclose()
        await until(lambda: host.engine.load.sessions == 0)


@pytest.mark.anyio
async def test_a_stream_of_another_version_is_told_which_is_older(hosts):
    async with hosts.host() as host, hosts.endpoint() as other:
        stream = await other._dial(host.peer, host.endpoint.addresses)
        await stream.send(b"CRLA%c" % (PROTOCOL_VERSION + 1) + bytes(15))
        failure = (await Channel(stream).receive(deadline_s=5)).message
        assert failure.code == "peer_outdated"
        assert "upgrade the older one" in failure.message
        await stream.aclose()

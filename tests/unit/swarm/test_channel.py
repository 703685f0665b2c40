"""Messages over streams: whole, in time, and with a reason when they fail."""

import anyio
import pytest

from corolla.errors import (
    FrameTooLarge,
    InternalError,
    PeerBusy,
    PeerLost,
    PeerOutdated,
    PeerTimeout,
    RemoteProtocolError,
)
from corolla.swarm import Channel
from corolla.wire import PROTOCOL_VERSION, Ack, Failure, Ping, Pong, Publish, encode_frame, encode_message
from corolla.wire.limits import MAX_PAYLOAD_BYTES

pytestmark = pytest.mark.anyio
DEADLINE_S = 20


def answering(*answers, delay=None):
    """Make a stream handler that answers each message with the next of these."""

    async def handler(stream):
        channel = Channel(stream)
        for answer in answers:
            await channel.receive()
            if delay is not None:
                await delay.wait()
            await channel.send(answer)
        await channel._stream.send_eof()
        await delay_end(channel)

    return handler


async def delay_end(channel):
    """Keep the stream open until the other side ends it."""
    async for _ in channel:
        pass


async def open_channel(net, listener, peer):
    return Channel(await net.dial(peer, listener.addresses[0]))


async def test_a_message_comes_back_with_payload_and_deadline(net):
    async def mirror(stream):
        channel = Channel(stream)
        async for received in channel:
            await channel.send(received.message, [received.payload], deadline_s=received.deadline_s)

    async with net.listening(mirror) as (listener, peer):
        channel = await open_channel(net, listener, peer)
        for size in (0, 1, 30_000, 3_000_000):
            payload = [bytes(range(256)) * (size // 256), b"x" * (size % 256)]
            received = await channel.request(Ping(), payload, expected=Ping, deadline_s=DEADLINE_S)
            assert received.message == Ping()
            assert received.payload == b"".join(payload)
            assert received.deadline_s == pytest.approx(DEADLINE_S, abs=1)
            assert channel.is_reusable
        received.payload[:1] = b"!"  # it belongs to the receiver
        await channel.aclose()


async def test_a_reported_failure_is_raised_and_the_channel_stays_good(net):
    busy = Failure.of(PeerBusy("no room", retry_after_s=3))
    async with net.listening(answering(busy, Pong())) as (listener, peer):
        channel = await open_channel(net, listener, peer)
        with pytest.raises(PeerBusy, match="no room") as caught:
            await channel.request(Ping(), expected=Pong)
        assert (caught.value.peer, caught.value.retry_after_s) == (peer, 3)
        await channel.request(Ping(), expected=Pong)
        await channel.aclose()


async def test_an_answer_of_another_type_ends_the_channel(net):
    async with net.listening(answering(Ack())) as (listener, peer):
        channel = await open_channel(net, listener, peer)
        with pytest.raises(RemoteProtocolError, match="answered Ack where Pong was due"):
            await channel.request(Ping(), expected=Pong)
        assert not channel.is_reusable


async def test_a_late_answer_is_a_timeout_after_which_the_channel_is_broken(net):
    never = anyio.Event()
    async with net.listening(answering(Pong(), delay=never)) as (listener, peer):
        channel = await open_channel(net, listener, peer)
        with pytest.raises(PeerTimeout, match=r"did not answer Ping within 0\.2 s") as caught:
            await channel.request(Ping(), expected=Pong, deadline_s=0.2)
        assert caught.value.peer == peer
        assert not channel.is_reusable
        with pytest.raises(PeerLost, match="broken"):
            await channel.receive()
        await channel.aclose()


async def test_a_peer_that_takes_nothing_is_a_timeout(net):
    never = anyio.Event()

    async def stall(_stream):
        await never.wait()

    async with net.listening(stall) as (listener, peer):
        channel = await open_channel(net, listener, peer)
        with pytest.raises(PeerTimeout, match="did not take Ping within"):
            await channel.send(Ping(), [bytes(MAX_PAYLOAD_BYTES)], deadline_s=0.3)
        await channel.aclose()


async def test_a_cancelled_receive_breaks_the_channel(net):
    never = anyio.Event()
    async with net.listening(answering(Pong(), delay=never)) as (listener, peer):
        channel = await open_channel(net, listener, peer)
        await channel.send(Ping())
        with anyio.move_on_after(0.05):
            await channel.receive()
        with pytest.raises(PeerLost, match="broken"):
            await channel.receive()
        await channel.aclose()
        with pytest.raises(PeerLost, match="closed"):
            await channel.send(Ping())


async def test_two_tasks_may_not_receive_at_once(net):
    async with net.listening(answering(Pong())) as (listener, peer):
        channel = await open_channel(net, listener, peer)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(channel.receive)
            await anyio.lowlevel.checkpoint()
            with pytest.raises(InternalError, match="two tasks"):
                await channel.receive()
            await channel.send(Ping())
        await channel.aclose()


async def test_an_end_between_messages_ends_the_iteration_and_one_in_a_message_does_not(net):
    frame = encode_frame(encode_message(Ping()))[0]
    for sent, count in ((b"", 0), (frame + frame, 2)):

        async def hang_up(stream, sent=sent):
            await stream.send(sent + frame[:7])

        async with net.listening(hang_up) as (listener, peer):
            channel = await open_channel(net, listener, peer)
            for _ in range(count):
                assert (await channel.receive()).message == Ping()
            with pytest.raises(PeerLost, match=peer[:8]):
                await anext(aiter(channel))
            await channel.aclose()

    async with net.listening(lambda stream: stream.send(frame)) as (listener, peer):
        channel = await open_channel(net, listener, peer)
        assert [received.message async for received in channel] == [Ping()]
        await channel.aclose()


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        (b"CRLA\x09" + bytes(15), PeerOutdated),
        (b"HTTP/1.1 400", RemoteProtocolError),
        (b"CRLA%c" % PROTOCOL_VERSION + bytes(7) + b"\xff" * 4 + bytes(4), FrameTooLarge),
        (encode_frame(b"\xc1")[0], RemoteProtocolError),
    ],
)
async def test_whoever_sends_nonsense_is_told_so_and_dropped(net, sent, error):
    async with net.serving(answer_pings) as server, net.endpoint() as client:
        stream = await client._dial(server.peer_id, server.addresses)
        await stream.send(sent)
        channel = Channel(stream)
        with anyio.fail_after(DEADLINE_S), pytest.raises(error) as caught:
            raise (await channel.receive()).message.error(server.peer_id)
        assert getattr(caught.value, "peer", server.peer_id) == server.peer_id
        with anyio.fail_after(DEADLINE_S), pytest.raises(PeerLost):
            await channel.receive()
        await channel.aclose()


async def answer_pings(channel):
    async for _ in channel:
        await channel.send(Pong())


async def test_a_request_whose_sending_fails_still_hears_why(net):
    async def refuse(channel):
        await channel.refuse(PeerBusy("come back later"))

    async with net.listening(lambda stream: refuse(Channel(stream))) as (listener, peer):
        channel = await open_channel(net, listener, peer)
        with pytest.raises(PeerBusy, match="come back"):
            await channel.request(Publish(records=()), [bytes(5_000_000)], expected=Ack, deadline_s=DEADLINE_S)
        await channel.aclose()


async def test_a_frame_over_the_limit_is_not_sent_and_harms_nothing(net):
    async with net.listening(answering(Pong())) as (listener, peer):
        channel = await open_channel(net, listener, peer)
        with pytest.raises(FrameTooLarge):
            await channel.send(Ping(), [bytes(MAX_PAYLOAD_BYTES), b"x"])
        await channel.request(Ping(), expected=Pong)
        await channel.aclose()

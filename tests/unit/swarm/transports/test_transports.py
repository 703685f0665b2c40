"""What every transport promises; each test runs over each of them."""

import os

import anyio
import pytest

from corolla.errors import ConfigError, PeerUnreachable
from corolla.swarm import Identity

from ..conftest import HOSTS, echo, receive_all, receive_exactly

pytestmark = pytest.mark.anyio
DEADLINE_S = 20


async def test_bytes_come_back_in_order(net):
    async with net.listening(echo) as (listener, peer):
        stream = await net.dial(peer, listener.addresses[0])
        for message in (b"a", b"bc" * 5000, bytes(range(256)) * 1000):
            await stream.send(message)
            assert await receive_exactly(stream, len(message)) == message
        await stream.aclose()


async def test_both_sides_see_who_the_other_is(net):
    seen = []

    async def note(stream):
        seen.append(stream.peer)
        await stream.send(b"x")

    async with net.listening(note) as (listener, peer):
        dialler = Identity.generate()
        stream = await net.transport(dialler).dial(None, listener.addresses[0])
        await stream.receive()
        assert (stream.peer, seen) == (peer, [dialler.peer_id])
        assert stream.path == {"tls": "direct", "memory": "memory"}[net.scheme]
        await stream.aclose()


async def test_another_peer_than_expected_is_refused_by_name(net):
    async with net.listening(echo) as (listener, peer):
        stranger = Identity.generate().peer_id
        with pytest.raises(PeerUnreachable, match=peer) as caught:
            await net.dial(stranger, listener.addresses[0])
        assert caught.value.peer == stranger


async def test_nobody_at_an_address_is_unreachable(net):
    async with net.listening(echo) as (listener, peer):
        address = listener.addresses[0]
    with pytest.raises(PeerUnreachable, match=address.rpartition(":")[2]):
        await net.dial(peer, address)


async def test_the_address_of_another_transport_is_a_config_error(net):
    with pytest.raises(ConfigError, match="carrier"):
        await net.dial(None, "carrier://pigeon:1")


async def test_a_port_in_use_is_a_config_error_that_names_it(net):
    async with net.listening(echo) as (listener, _):
        port = int(listener.addresses[0].rpartition(":")[2])
        with pytest.raises(ConfigError, match=f"port {port} .* in use"):
            await net.transport(Identity.generate()).listen(HOSTS[net.scheme], port)


async def test_addresses_can_be_announced_instead_of_found(net):
    listener = await net.transport(Identity.generate()).listen(HOSTS[net.scheme], 0, announce=["tls://192.0.2.1:7"])
    assert listener.addresses == ("tls://192.0.2.1:7",)
    await listener.aclose()


async def test_after_the_end_is_sent_bytes_still_come_the_other_way(net):
    async def answer_after_the_end(stream):
        received = await receive_all(stream)
        await stream.send(received[::-1])
        await stream.send_eof()

    async with net.listening(answer_after_the_end) as (listener, peer):
        stream = await net.dial(peer, listener.addresses[0])
        message = os.urandom(300_000)
        await stream.send(message)
        await stream.send_eof()
        assert await receive_all(stream) == message[::-1]
        await stream.aclose()


async def test_the_end_may_be_sent_while_bytes_arrive(net):
    message = os.urandom(500_000)

    async def send_at_once(stream):
        await stream.send(message)
        assert await receive_all(stream) == b"done"

    async with net.listening(send_at_once) as (listener, peer):
        stream = await net.dial(peer, listener.addresses[0])
        start = await stream.receive(1000)
        await stream.send(b"done")
        await stream.send_eof()
        assert start + await receive_exactly(stream, len(message) - len(start)) == message
        await stream.aclose()


async def test_nothing_can_be_sent_after_the_end(net):
    async with net.listening(echo) as (listener, peer):
        stream = await net.dial(peer, listener.addresses[0])
        await stream.send_eof()
        with pytest.raises(anyio.ClosedResourceError):
            await stream.send(b"more")
        await stream.aclose()


async def test_large_transfers_both_ways_at_once(net):
    there, back = os.urandom(8_000_000), os.urandom(8_000_000)

    async def exchange(stream, outgoing, incoming):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(stream.send, outgoing)
            assert await receive_exactly(stream, len(incoming)) == incoming

    async with net.listening(lambda stream: exchange(stream, back, there)) as (listener, peer):
        stream = await net.dial(peer, listener.addresses[0])
        await exchange(stream, there, back)
        await stream.aclose()


async def test_whoever_sends_to_one_that_does_not_read_waits(net):
    accepted, stalled = anyio.Event(), anyio.Event()

    async def stall(stream):
        accepted.set()
        await stalled.wait()

    async with net.listening(stall) as (listener, peer):
        stream = await net.dial(peer, listener.addresses[0])
        await accepted.wait()
        sent_bytes = 0
        with anyio.move_on_after(1):
            while True:
                await stream.send(bytes(65536))
                sent_bytes += 65536
        assert 0 < sent_bytes < 16_000_000  # the kernel's buffers and those of both sides
        stalled.set()
        await stream.aclose()


async def test_a_cancelled_receive_leaves_a_stream_that_can_be_closed(net):
    async with net.listening(echo) as (listener, peer):
        stream = await net.dial(peer, listener.addresses[0])
        with anyio.move_on_after(0.01):
            await stream.receive()
        await stream.aclose()
        with pytest.raises(anyio.ClosedResourceError):
            await stream.send(b"x")


async def test_the_end_of_one_side_is_seen_by_the_other(net):
    async def hang_up(_stream):
        return

    async with net.listening(hang_up) as (listener, peer):
        stream = await net.dial(peer, listener.addresses[0])
        with anyio.fail_after(DEADLINE_S), pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)):
            await stream.receive()
        assert not stream.is_quiet
        await stream.aclose()


async def test_a_stream_is_quiet_until_something_arrives(net):
    async with net.listening(echo) as (listener, peer):
        stream = await net.dial(peer, listener.addresses[0])
        await stream.send(b"xy")
        await stream.receive(1)
        assert not stream.is_quiet
        await stream.receive(1)
        assert stream.is_quiet
        await stream.aclose()


async def test_a_hundred_streams_at_once(net):
    async with net.listening(echo) as (listener, peer):
        transport = net.transport(Identity.generate())

        async def talk(number):
            stream = await transport.dial(peer, listener.addresses[0])
            message = number.to_bytes(4, "big") * 1000
            await stream.send(message)
            assert await receive_exactly(stream, len(message)) == message
            await stream.aclose()

        with anyio.fail_after(DEADLINE_S):
            async with anyio.create_task_group() as tasks:
                for number in range(100):
                    tasks.start_soon(talk, number)

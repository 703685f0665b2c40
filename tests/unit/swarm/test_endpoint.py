"""An endpoint keeps good channels, drops bad ones, and survives its handlers."""

import contextlib
import logging

import anyio
import pytest

from corolla.errors import CacheFull, ConfigError, PeerBusy, PeerFailed, PeerLost, PeerUnreachable
from corolla.swarm import Endpoint, Identity, Pings, SwarmConfig
from corolla.wire import Ping, Pong

pytestmark = pytest.mark.anyio
DEADLINE_S = 20


class Pinged:
    """A handler that answers pings and remembers its channels."""

    def __init__(self):
        self.channels = []
        self.ended = anyio.Event()

    async def __call__(self, channel):
        self.channels.append(channel)
        try:
            async for _ in channel:
                await channel.send(Pong())
        finally:
            self.ended.set()


async def ping(client, server):
    async with client.channel(server.peer_id, server.addresses) as channel:
        await channel.request(Ping(), expected=Pong, deadline_s=DEADLINE_S)


async def fail_after_a_ping(client, server):
    async with client.channel(server.peer_id, server.addresses) as channel:
        await channel.request(Ping(), expected=Pong)
        raise ZeroDivisionError


async def test_an_idle_channel_is_used_again(net):
    async with net.serving(handler := Pinged()) as server, net.endpoint() as client:
        for _ in range(5):
            await ping(client, server)
        assert len(handler.channels) == 1


async def test_a_channel_whose_block_failed_is_not(net):
    async with net.serving(handler := Pinged()) as server, net.endpoint() as client:
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                await fail_after_a_ping(client, server)
        async with client.channel(server.peer_id, server.addresses) as channel:
            await channel.send(Ping())  # and nobody waits for the answer
        await ping(client, server)
        assert len(handler.channels) == 4


async def test_a_channel_that_died_while_idle_is_replaced(net):
    async with net.serving(handler := Pinged()) as server, net.endpoint() as client:
        await ping(client, server)
        idle = client._idle[server.peer_id][0].channel
        await handler.channels[0].aclose()
        with anyio.fail_after(DEADLINE_S):
            while idle.is_reusable:
                await anyio.lowlevel.checkpoint()
        await ping(client, server)
        assert len(handler.channels) == 2


async def test_idle_channels_are_closed_in_time_and_no_more_are_kept_than_allowed(net):
    config = SwarmConfig(idle_s=0.2, max_idle_per_peer=2)
    async with net.serving(handler := Pinged()) as server, net.endpoint(config) as client:
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(4):
                await stack.enter_async_context(client.channel(server.peer_id, server.addresses))
        assert len(client._idle[server.peer_id]) == 2
        with anyio.fail_after(DEADLINE_S):
            while client._idle:
                await anyio.lowlevel.checkpoint()
            await handler.ended.wait()


async def test_the_next_address_is_tried_and_all_are_named_if_none_answers(net):
    async with net.serving(Pinged()) as server, net.endpoint() as client:
        wrong = (f"{net.scheme}://127.0.0.1:9", "carrier://pigeon:1")
        async with client.channel(server.peer_id, (*wrong, *server.addresses)) as channel:
            await channel.request(Ping(), expected=Pong)
        with pytest.raises(PeerUnreachable) as caught:
            async with client.channel(Identity.generate().peer_id, (*wrong, *server.addresses)):
                pass
        for named in (*wrong[:1], "carrier", server.peer_id):
            assert named in caught.value.message
        with pytest.raises(PeerUnreachable, match="no address"):
            async with client.channel(None, ()):
                pass


async def test_an_address_that_does_not_answer_does_not_hold_up_the_next(tls_net):
    silent = await anyio.create_tcp_listener(local_host="127.0.0.1")
    async with silent, tls_net.serving(Pinged()) as server, tls_net.endpoint() as client:
        stuck = f"tls://127.0.0.1:{silent.extra(anyio.abc.SocketAttribute.local_port)}"
        with anyio.fail_after(client.config.handshake_s / 2):
            async with client.channel(server.peer_id, (stuck, *server.addresses)) as channel:
                await channel.request(Ping(), expected=Pong)


async def test_what_a_peer_announces_as_its_address_may_be_anything(tls_net):
    announced = ["tls://" + "a" * 100 + ":1", "tls://nul\0:1", "tls://-.é..:1", "tls://[::%%]:1", "nonsense", "tls://"]
    async with tls_net.endpoint() as client:
        with pytest.raises(PeerUnreachable) as caught:
            async with client.channel(Identity.generate().peer_id, announced):
                pass
        assert all(text in caught.value.message for text in (announced[0], announced[-1]))


async def test_an_error_passes_through_an_endpoint_as_it_is(net):
    with pytest.raises(PeerUnreachable):
        async with net.endpoint() as client, client.channel(Identity.generate().peer_id, ()):
            pass


async def test_whoever_is_at_an_address_can_be_met(net):
    async with (
        net.serving(Pinged()) as server,
        net.endpoint() as client,
        client.channel(None, server.addresses) as channel,
    ):
        assert channel.peer == server.peer_id


async def test_errors_of_a_handler_are_reported_and_cost_one_channel(net, caplog):
    async def fail(channel):
        failures = {0: CacheFull("3 pages are free"), 1: ZeroDivisionError("secret")}
        received = await channel.receive()
        async with anyio.create_task_group():
            raise failures[received.payload.nbytes]

    async with net.serving(fail) as server, net.endpoint() as client:
        with caplog.at_level(logging.ERROR, "corolla"):
            for size, error, words in ((0, CacheFull, "3 pages"), (1, PeerFailed, "internal error")):
                with pytest.raises(error, match=words) as caught:
                    async with client.channel(server.peer_id, server.addresses) as channel:
                        await channel.request(Ping(), [bytes(size)], expected=Pong, deadline_s=DEADLINE_S)
                assert "secret" not in str(caught.value)
        assert "ZeroDivisionError: secret" in caplog.text


async def test_streams_over_the_limit_are_answered_busy(net):
    config = SwarmConfig(max_streams_per_peer=1)
    async with (
        net.serving(Pinged(), config) as server,
        net.endpoint() as client,
        net.endpoint() as other,
        client.channel(server.peer_id, server.addresses) as first,
    ):
        await first.request(Ping(), expected=Pong)
        with pytest.raises(PeerBusy):
            await ping(client, server)
        await ping(other, server)


async def test_a_peer_that_is_cut_off_is_lost_and_then_unreachable(memory_net):
    async with memory_net.serving(Pinged()) as server, memory_net.endpoint() as client:
        async with client.channel(server.peer_id, server.addresses) as channel:
            memory_net.memory.cut(server.peer_id)
            with pytest.raises(PeerLost, match=server.peer_id[:8]):
                await channel.request(Ping(), expected=Pong)
        with pytest.raises(PeerUnreachable):
            await ping(client, server)
        memory_net.memory.mend(server.peer_id)
        await ping(client, server)


async def test_a_stream_that_breaks_in_the_middle_of_an_answer_is_lost(memory_net):
    async def answer_at_length(channel):
        async for _ in channel:
            await channel.send(Pong(), [bytes(1_000_000)])

    async with memory_net.serving(answer_at_length) as server, memory_net.endpoint() as client:
        memory_net.memory.drop_after(server.peer_id, 400_000)
        with pytest.raises(PeerLost):
            await ping(client, server)
        await ping(client, server)


async def test_pings_measure_the_way_there_and_back(memory_net):
    async with memory_net.serving(Pinged()) as server, memory_net.endpoint() as client:
        pings = Pings(client)
        assert pings.rtt_s(server.peer_id) is None
        memory_net.memory.delay_s = 0.02
        first_s = await pings.ping(server.peer_id, server.addresses)
        assert first_s == pings.rtt_s(server.peer_id) >= 0.04
        memory_net.memory.delay_s = 0.0
        second_s = await pings.ping(server.peer_id, server.addresses)
        assert second_s < pings.rtt_s(server.peer_id) < first_s


def test_settings_that_cannot_be_are_config_errors(memory_net):
    for wrong in ({"idle_s": 0}, {"refresh_s": 30.0}, {"heartbeat_s": 9.0}, {"max_peers": 1 << 20}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            SwarmConfig(**wrong)
    identity = Identity.generate()
    with pytest.raises(ConfigError, match="same scheme"):
        Endpoint(identity, [memory_net.transport(identity)] * 2)

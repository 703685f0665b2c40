"""A relay joins peers that cannot reach each other, reads nothing of it, and gives no more than its owner allows."""

import contextlib

import anyio
import pytest

from corolla.errors import ConfigError, PeerBusy, PeerError, PeerLost, PeerTimeout, PeerUnreachable, RemoteProtocolError
from corolla.swarm import Identity, RelayConfig, SwarmConfig, TlsTransport, parse_address, split_address
from corolla.swarm.reach.relayed import RelayTransport
from corolla.swarm.transports.tunnel import TunnelPipe
from corolla.wire import Accept, Connect, Connected, Incoming, Ping, Pong, Publish, Record, Reserve, Reserved

from .reachable import client, hidden, ping, relaying

pytestmark = pytest.mark.anyio
DEADLINE_S = 20
QUICK = SwarmConfig(heartbeat_s=0.1, lost_after_s=1.0)


async def test_a_hidden_peer_is_reached_by_its_key():
    async with relaying() as relay, hidden([relay]) as server, client() as endpoint:
        assert split_address(server.addresses[0]).relay == relay.endpoint.peer_id
        assert await ping(endpoint, server.peer, server.addresses) == "relayed"
        assert relay.relay.load.streams == 1
        stranger = Identity.generate().peer_id
        with pytest.raises(PeerUnreachable, match="not behind this relay"):
            await ping(endpoint, stranger, server.addresses)


async def test_a_stream_that_was_used_once_is_used_again():
    async with relaying() as relay, hidden([relay]) as server, client() as endpoint:
        for _ in range(5):
            await ping(endpoint, server.peer, server.addresses)
        assert relay.relay.load.streams == 1


async def test_a_relay_sees_only_ciphertext():
    secret = b"that nobody in between may read " * 100
    received, passed = [], bytearray()

    async def keep(channel):
        async for message in channel:
            received.append(message.message.records[0].body)
            await channel.send(Pong())

    async with relaying() as relay, hidden([relay], keep) as server, client() as endpoint:
        endpoint.add_transport(Tap(endpoint, passed))
        async with endpoint.channel(server.peer, server.addresses) as channel:
            publish = Publish(records=(Record(b"", bytes(64), 0.0, secret),))
            await channel.request(publish, expected=Pong, deadline_s=DEADLINE_S)
    assert received == [secret]
    assert len(passed) > len(secret)
    assert secret[:16] not in bytes(passed)


class Tap(RelayTransport):
    """Notes what is given to the relay to carry."""

    def __init__(self, endpoint, passed):
        super().__init__(endpoint, Tapped(endpoint.identity, endpoint.config, passed))


class Tapped(TlsTransport):
    def __init__(self, identity, config, passed):
        super().__init__(identity, config)
        self._passed = passed

    async def dial_over(self, pipe, peer, address):
        if isinstance(pipe, TunnelPipe):
            send = pipe.send

            async def note(data):
                self._passed.extend(data)
                await send(data)

            pipe.send = note
        return await super().dial_over(pipe, peer, address)


async def test_a_relay_cannot_pass_for_the_peer_behind_it():
    async with relaying(accept_s=0.3) as relay, client() as endpoint, hidden([relay]) as server:
        impostor = Identity.generate().peer_id
        relay.relay._places[impostor] = relay.relay._places[server.peer]
        with pytest.raises(PeerUnreachable):  # the server refuses the ticket of another
            await ping(endpoint, impostor, server.addresses)


async def test_many_streams_carry_much_in_both_directions_at_once():
    body = bytes(range(256)) * 12

    async def echo(channel):
        async for received in channel:
            await channel.send(received.message)

    async with relaying() as relay, hidden([relay], echo) as server, client() as endpoint:

        async def talk():
            async with endpoint.channel(server.peer, server.addresses) as channel:
                for _ in range(20):
                    publish = Publish(records=(Record(b"", bytes(64), 0.0, body),) * 32)
                    answer = await channel.request(publish, expected=Publish, deadline_s=DEADLINE_S)
                    assert answer.message.records[-1].body == body

        async with anyio.create_task_group() as tasks:
            for _ in range(6):
                tasks.start_soon(talk)
        assert relay.relay.load.streams == 6
        assert relay.relay.load.passed_bytes > 6 * 20 * 2 * 32 * len(body)


async def test_a_peer_that_hangs_up_ends_the_stream_on_the_other_side_and_at_the_relay(until):
    ended = anyio.Event()

    async def wait_for_the_end(channel):
        async for _ in channel:
            await channel.send(Pong())
        ended.set()

    async with relaying() as relay, hidden([relay], wait_for_the_end) as server:
        async with client() as endpoint:
            await ping(endpoint, server.peer, server.addresses)
        with anyio.fail_after(DEADLINE_S):
            await ended.wait()
        await until(lambda: relay.relay.load.streams == 0)


async def test_streams_are_limited_by_peer_and_the_refusal_says_so():
    async with relaying(max_streams_per_peer=2) as relay, hidden([relay]) as server, client() as endpoint:
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(2):
                await stack.enter_async_context(endpoint.channel(server.peer, server.addresses))
            with pytest.raises(PeerUnreachable, match="joins 2 streams for"):
                await ping(endpoint, server.peer, server.addresses)
        assert relay.relay.load.refused == 1


async def test_places_are_limited_and_the_newest_stream_of_a_peer_counts():
    async with relaying(max_peers=1) as relay, hidden([relay]) as server, client() as endpoint:
        async with endpoint.channel(relay.endpoint.peer_id, relay.endpoint.addresses) as channel:
            with pytest.raises(PeerBusy, match="ask another"):
                await channel.request(Reserve(), expected=Reserved, deadline_s=DEADLINE_S)
        async with server.endpoint.channel(relay.endpoint.peer_id, relay.endpoint.addresses) as channel:
            await channel.request(Reserve(), expected=Reserved, deadline_s=DEADLINE_S)
            await channel.request(Ping(), expected=Pong, deadline_s=DEADLINE_S)
            assert relay.relay.load.peers == 1


async def test_the_bytes_of_a_day_are_limited():
    async with relaying(day_bytes=20_000) as relay, hidden([relay]) as server, client() as endpoint:

        async def talk_for_long():
            async with endpoint.channel(server.peer, server.addresses) as channel:
                for _ in range(1000):
                    await channel.request(Ping(), expected=Pong, deadline_s=DEADLINE_S)

        with pytest.raises(PeerError):
            await talk_for_long()
        assert 20_000 <= relay.relay.load.day_bytes < 30_000
        with pytest.raises(PeerUnreachable, match="20000 bytes of the day"):
            await ping(endpoint, server.peer, server.addresses)


async def test_the_bytes_of_a_second_are_limited():
    async with relaying(second_bytes=100_000) as relay, hidden([relay]) as server, client() as endpoint:
        await ping(endpoint, server.peer, server.addresses)
        before, begin_s = relay.relay.load.passed_bytes, anyio.current_time()
        async with endpoint.channel(server.peer, server.addresses) as channel:
            records = (Record(b"", bytes(64), 0.0, bytes(3000)),) * 10
            await channel.send(Publish(records=records))
            await channel.receive(deadline_s=DEADLINE_S)
        spent_s = anyio.current_time() - begin_s
        assert relay.relay.load.passed_bytes - before > 30_000
        assert spent_s > 0.25


async def test_whoever_does_not_come_when_told_is_given_up_and_so_is_a_late_ticket():
    async with relaying(accept_s=0.2) as relay, client() as lazy, client() as endpoint:
        async with lazy.channel(relay.endpoint.peer_id, relay.endpoint.addresses) as place:
            await place.request(Reserve(), expected=Reserved, deadline_s=DEADLINE_S)
            address = f"relay://{relay.endpoint.addresses[0].removeprefix('tls://')}/{relay.endpoint.peer_id}"
            with pytest.raises(PeerUnreachable, match="was told and did not come within 0.2 s"):
                await ping(endpoint, lazy.peer_id, [address])
            offer = (await place.receive(deadline_s=DEADLINE_S)).message
            assert isinstance(offer, Incoming)
            assert offer.peer == endpoint.peer_id
            async with lazy.channel(relay.endpoint.peer_id, relay.endpoint.addresses) as late:
                with pytest.raises(PeerTimeout, match="does not wait any more"):
                    await late.request(Accept(ticket=offer.ticket), expected=Connected, deadline_s=DEADLINE_S)
        assert relay.relay.load.streams == 0


async def test_a_ticket_is_good_for_its_peer_alone():
    async with relaying() as relay, client() as target, client() as thief, client() as endpoint:
        contact = relay.contact
        async with target.channel(contact.peer, contact.addresses) as place, anyio.create_task_group() as tasks:
            await place.request(Reserve(), expected=Reserved, deadline_s=DEADLINE_S)

            async def connect():
                async with endpoint.channel(contact.peer, contact.addresses) as channel:
                    await channel.request(Connect(peer=target.peer_id), expected=Connected, deadline_s=DEADLINE_S)

            tasks.start_soon(connect)
            offer = (await place.receive(deadline_s=DEADLINE_S)).message
            async with thief.channel(contact.peer, contact.addresses) as stolen:
                with pytest.raises(RemoteProtocolError, match="ticket of peer"):
                    await stolen.request(Accept(ticket=offer.ticket), expected=Connected, deadline_s=DEADLINE_S)
            async with target.channel(contact.peer, contact.addresses) as own:
                await own.request(Accept(ticket=offer.ticket), expected=Connected, deadline_s=DEADLINE_S)


async def test_a_peer_that_says_nothing_loses_its_place(until):
    async with (
        relaying(QUICK) as relay,
        client() as silent,
        silent.channel(relay.endpoint.peer_id, relay.endpoint.addresses) as place,
    ):
        await place.request(Reserve(), expected=Reserved, deadline_s=DEADLINE_S)
        assert relay.relay.load.peers == 1
        await until(lambda: relay.relay.load.peers == 0)


async def test_a_lost_relay_is_replaced_and_work_through_it_ends_with_an_error():
    async with contextlib.AsyncExitStack() as stack:
        relays = [await stack.enter_async_context(relaying()) for _ in range(3)]
        server = await stack.enter_async_context(hidden(relays, config=QUICK))
        endpoint = await stack.enter_async_context(client())
        (first, _) = server.ear.addresses
        lost = next(one for one in relays if one.endpoint.peer_id == split_address(first).relay)
        async with endpoint.channel(server.peer, [first]) as channel:
            await channel.request(Ping(), expected=Pong, deadline_s=DEADLINE_S)
            relays.remove(lost)
            await lost.die()
            with pytest.raises(PeerLost):
                await channel.receive(deadline_s=DEADLINE_S)
        with anyio.fail_after(DEADLINE_S):
            while first in server.ear.addresses or len(server.ear.addresses) < 2:
                await server.ear.wait()
        await ping(endpoint, server.peer, server.ear.addresses)


async def test_a_peer_that_can_be_dialled_gives_its_places_up(until):
    async with relaying() as relay, hidden([relay]) as server:
        server.ear.want(False)
        await until(lambda: not server.ear.addresses and relay.relay.load.peers == 0)


@pytest.mark.parametrize("text", ["relay://h:1", "relay://h:1/x", "tls://h:1/{0}/{0}", "relay://h:1/{0}/x"])
def test_addresses_that_are_none_are_refused(text):
    with pytest.raises(ConfigError):
        parse_address(text.format(Identity.generate().peer_id))


def test_an_address_behind_a_relay_names_both_peers():
    relay, peer = Identity.generate().peer_id, Identity.generate().peer_id
    assert parse_address(f"relay://h:1/{relay}/{peer}") == (peer, f"relay://h:1/{relay}")
    assert parse_address(f"relay://[::1]:1/{relay}") == (None, f"relay://[::1]:1/{relay}")
    assert split_address(f"relay://h:1/{relay}").relay == relay


@pytest.mark.parametrize("field", ["max_peers", "day_bytes", "accept_s"])
def test_limits_are_positive(field):
    with pytest.raises(ConfigError, match=field):
        RelayConfig(**{field: 0})

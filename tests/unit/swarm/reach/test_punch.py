"""A direct path replaces a relayed one for the next use, and knocking is confined to whom it may concern."""

import anyio
import pytest

from corolla.errors import PeerBusy, PeerUnreachable, RemoteProtocolError
from corolla.swarm.reach.punch import _View
from corolla.swarm.transports.transport import Spot
from corolla.wire import Punch, Punched

from .reachable import client, hidden, ping, relaying

pytestmark = pytest.mark.anyio
DEADLINE_S = 20
HOME, PUBLIC = Spot("192.168.1.2", 4000), Spot("198.51.100.7", 5000)  # RFC 5737 addresses are not global


async def test_after_the_first_use_the_path_is_direct(until):
    async with relaying() as relay, hidden([relay]) as server, client(upgrades=True) as endpoint:
        assert await ping(endpoint, server.peer, server.addresses) == "relayed"
        await until(lambda: endpoint.has_direct(server.peer))
        assert await ping(endpoint, server.peer, server.addresses) == "direct"


async def test_as_long_as_it_is_used_another_direct_channel_is_made_ready(until):
    async with relaying() as relay, hidden([relay]) as server, client(upgrades=True) as endpoint:
        await ping(endpoint, server.peer, server.addresses)
        await until(lambda: endpoint.has_direct(server.peer))
        async with endpoint.channel(server.peer, server.addresses) as channel:
            assert channel.path == "direct"
            await until(lambda: endpoint.has_direct(server.peer))
        assert endpoint.on_use.__self__.found == 2


async def test_a_peer_meets_each_other_peer_once_at_a_time():
    async with (
        relaying() as relay,
        hidden([relay]) as server,
        client() as endpoint,
        endpoint.channel(server.peer, server.addresses) as channel,
    ):
        await channel.request(Punch(addresses=()), expected=Punched, deadline_s=DEADLINE_S)
        with pytest.raises(PeerBusy, match="being met"):
            await channel.request(Punch(addresses=()), expected=Punched, deadline_s=DEADLINE_S)


async def test_without_a_relay_there_is_nobody_to_say_how_one_is_seen():
    relays = []
    async with relaying() as relay:
        relays.append(relay)
        async with (
            hidden(relays) as server,
            client() as endpoint,
            endpoint.channel(server.peer, server.addresses) as channel,
        ):
            relays.clear()
            with pytest.raises(PeerUnreachable, match="not behind a relay"):
                await channel.request(Punch(addresses=()), expected=Punched, deadline_s=DEADLINE_S)


def test_a_stranger_cannot_make_a_peer_knock_inside_its_own_home():
    view = _View(HOME, Spot("9.9.9.9", 7000))
    assert view.choose(["tls://8.8.8.8:1", "tls://192.168.1.1:80"]) == [Spot("8.8.8.8", 1)]
    assert view.choose(["tls://9.9.9.9:1", "tls://192.168.1.3:2"]) == [Spot("9.9.9.9", 1), Spot("192.168.1.3", 2)]
    assert view.choose(["tls://127.0.0.1:22"]) == []


@pytest.mark.parametrize("address", ["tls://host.example:1", "x", "tls://8.8.8.8:99999"])
def test_where_to_meet_is_told_in_ip_addresses(address):
    with pytest.raises(RemoteProtocolError, match="to meet at"):
        _View(HOME, PUBLIC).choose([address])


async def test_what_is_not_found_in_time_is_not_sought_again_at_once(until):
    async with relaying() as relay, hidden([relay]) as server, client(upgrades=True) as endpoint:
        upgrades = endpoint.on_use.__self__

        async def never(*_):
            return None

        upgrades._knock_until_one_opens = never
        await ping(endpoint, server.peer, server.addresses)
        await until(lambda: server.peer in upgrades._failed)
        await ping(endpoint, server.peer, server.addresses)
        await anyio.lowlevel.checkpoint()
        assert not upgrades._trying

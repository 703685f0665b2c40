"""A server looks for others only where it may, and where it knows of none."""

import anyio
import pytest

from corolla.swarm import Contacts, Endpoint, Identity, Meeting, SwarmConfig, TlsTransport, Topic

MODEL = "ab" * 32
LIMIT_S = 30.0


def meeting(host="0.0.0.0", peers=(), *, is_apart=False, **config):
    endpoint = Endpoint(Identity.generate(), [], SwarmConfig(**config))
    return Meeting(endpoint, Contacts(peers), host=host, is_apart=is_apart)


@pytest.mark.parametrize(
    ("settings", "is_on"),
    [
        ({}, True),
        ({"lan": False}, False),
        ({"is_apart": True}, False),
        ({"host": "127.0.0.1"}, False),
        ({"host": "localhost"}, False),
        ({"host": "127.0.0.1", "lan_interface": "127.0.0.1"}, True),
        ({"peers": ("tls://192.0.2.7:1",)}, True),  # to be found
    ],
)
def test_the_local_network_is_used_where_others_can_be(settings, is_on):
    assert (meeting(**settings)._network is not None) == is_on


@pytest.mark.anyio
async def test_who_knows_a_peer_does_not_look_for_others():
    async with meeting(host="127.0.0.1", peers=("tls://192.0.2.7:1",), lan_interface="127.0.0.1") as known:
        assert await known.look(Topic(None, MODEL)) == []


@pytest.mark.anyio
async def test_servers_of_one_private_swarm_meet_through_a_dht_of_their_own():
    pytest.importorskip("libtorrent", reason="libtorrent is not here: pip install 'corolla[dht]'")
    topic, own = Topic(Identity.generate().peer_id, MODEL), {"dht": True, "dht_listen": "127.0.0.1:0", "dht_s": LIMIT_S}
    config = SwarmConfig(dht_bootstrap=("127.0.0.1:9",), **own)
    identity = Identity.generate()
    async with Endpoint(identity, [TlsTransport(identity, config)], config) as endpoint:
        await endpoint.listen("tls", "127.0.0.1", 0)
        async with Meeting(endpoint, Contacts(), host="127.0.0.1") as first, anyio.create_task_group() as tasks:
            tasks.start_soon(first.run, topic, "tiny")
            async with meeting(host="127.0.0.1", dht_bootstrap=(first._dht.place,), **own) as second:
                (found,) = await second.look(topic)
                assert found.addresses == endpoint.addresses
                assert second._contacts.all() == [found]
            tasks.cancel_scope.cancel()

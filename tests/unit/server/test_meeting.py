"""A server looks for others only where it may, and where it knows of none."""

import pytest

from corolla.server import ServerConfig
from corolla.server.meeting import Meeting
from corolla.swarm import Contacts, Endpoint, Identity, SwarmConfig, Topic

MODEL = "ab" * 32


def meeting(host="0.0.0.0", peers=(), *, new_swarm=False, **swarm):
    config = ServerConfig(model="tiny", host=host, peers=peers, new_swarm=new_swarm)
    return Meeting(config, Endpoint(Identity.generate(), [], SwarmConfig(**swarm)), Contacts(peers))


@pytest.mark.parametrize(
    ("settings", "is_on"),
    [
        ({}, True),
        ({"lan": False}, False),
        ({"new_swarm": True}, False),
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

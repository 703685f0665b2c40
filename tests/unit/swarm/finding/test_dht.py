"""Peers find each other through a DHT of their own, on the loopback interface; the public one is never asked."""

import anyio
import pytest

from corolla.errors import ConfigError
from corolla.swarm import Identity, MainlineDht, SwarmConfig, Topic

pytest.importorskip("libtorrent", reason="libtorrent is not here: pip install 'corolla[dht]'")
pytestmark = pytest.mark.anyio
SWARM = Identity.generate().peer_id
NOBODY = "127.0.0.1:9"  # to enter by, for the first peer; it is not empty, for then the public DHT would be meant
LIMIT_S = 30.0


def dht(*bootstrap):
    return MainlineDht(SwarmConfig(dht=True, dht_bootstrap=bootstrap or (NOBODY,), dht_listen="127.0.0.1:0"))


async def test_who_announced_itself_is_found_and_nobody_else():
    topic, other = Topic(SWARM, None), Topic(None, "ab" * 32)
    async with (
        dht() as first,
        dht(first.place) as server,
        dht(first.place) as client,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(server.announce, topic, 31330)
        assert await client.look(topic, LIMIT_S) == ["tls://127.0.0.1:31330"]
        assert await client.look(other, 1.0) == []
        tasks.cancel_scope.cancel()


async def test_a_dht_of_ones_own_asks_nobody_else():
    async with dht() as alone:
        applied = alone._session.get_settings()
        assert applied["dht_bootstrap_nodes"] == ""
        assert applied["listen_interfaces"] == "127.0.0.1:0"
        switches = ["enable_lsd", "enable_upnp", "enable_natpmp", "enable_outgoing_tcp", "enable_incoming_tcp"]
        assert not any(applied[switch] for switch in switches)


def test_by_default_no_dht_is_used():
    assert not SwarmConfig().dht


@pytest.mark.parametrize("text", ["nowhere", "127.0.0.1", "127.0.0.1:0", ":7", "a b:7"])
def test_a_place_to_enter_by_is_a_host_and_a_port(text):
    with pytest.raises(ConfigError, match="write host:port"):
        dht(text)

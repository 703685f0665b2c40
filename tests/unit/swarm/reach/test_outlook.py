"""What peers see of one machine's port tells what router is between."""

import pytest

from corolla.swarm.reach.outlook import _Seen, tell_router
from corolla.swarm.transports.transport import Spot

HOME = Spot("10.0.0.7", 40000)


def seen(host, port, here=HOME):
    return _Seen(here, Spot(host, port), 0.0)


@pytest.mark.parametrize(
    ("views", "router"),
    [
        ([], "unknown"),
        ([seen("10.0.0.7", 40000)], "none"),
        ([seen("10.0.0.7", 40000), seen("10.0.0.7", 40000)], "none"),
        ([seen("8.8.4.4", 40000)], "some"),
        ([seen("8.8.4.4", 5000), seen("8.8.4.4", 5000)], "friendly"),
        ([seen("8.8.4.4", 5000), seen("8.8.4.4", 5001)], "symmetric"),
        ([seen("8.8.4.4", 5000), seen("8.8.4.4", 5001, Spot("10.0.0.7", 41000))], "some"),
        ([seen("10.0.0.7", 40000), seen("8.8.4.4", 5000), seen("8.8.4.4", 5000)], "friendly"),
    ],
)
def test_the_kind_of_router_follows_from_what_peers_see(views, router):
    assert tell_router(views) == router

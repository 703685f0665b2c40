"""Where the tests' directories are kept: by gossip, or in a Redis of their own."""

from dataclasses import replace

import pytest

from corolla.swarm import SwarmConfig

QUICK = SwarmConfig(
    gossip_interval_s=0.3,
    ttl_s=2.0,
    refresh_s=0.4,
    heartbeat_s=0.05,
    lost_after_s=1.0,
    suspect_s=0.5,
    heal_s=0.2,
    request_s=1.0,
    handshake_s=2.0,
)


@pytest.fixture(params=["gossip", "redis"])
def kept(request, redis_server):
    """The settings of peers whose directory is kept in one way or another."""
    if request.param == "gossip":
        return QUICK
    return replace(QUICK, directory=request.getfixturevalue("redis").url())

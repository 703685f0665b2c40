"""One look at a swarm, as a peer that only watches: what its servers announce, and how far away they are. No torch."""

import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import anyio

from corolla.errors import Error, ungrouped
from corolla.swarm import (
    Directory,
    Endpoint,
    Identity,
    Pings,
    SwarmConfig,
    TlsTransport,
    Watcher,
    contacts_of,
    dial_through_relays,
    make_watcher,
)
from corolla.terms import Announcement, PeerId, Snapshot

__all__ = ["Look", "look_at_swarm", "watching"]

_PINGS_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Look:
    """What was seen.

    Args:
        snapshot: The announcements.
        rtts_s: How long the way there and back takes; without the servers that did not answer.
        dropped: How many announcements were dropped, and why.
    """

    snapshot: Snapshot
    rtts_s: dict[PeerId, float]
    dropped: dict[str, int]


@asynccontextmanager
async def watching(config: SwarmConfig, peers: Sequence[str]) -> AsyncIterator[tuple[Endpoint, Watcher]]:
    """Be a peer that has seen the whole of a swarm, for the length of a block.

    Args:
        config: How to talk to it; in a private swarm, with the invite.
        peers: Addresses of its peers; those of the invite are tried as well.

    Raises:
        UsageError: If the invite is none, or an address cannot be read.
        BootstrapFailed: If no peer answers.
        NotAMember: If the swarm turns this peer away.
    """
    identity = Identity.generate()
    tls = TlsTransport(identity, config)
    endpoint = Endpoint(identity, [tls], config)
    upgrades = dial_through_relays(endpoint, tls)
    directory = Directory(config, admits=endpoint.admits, wall_s=time.time)
    contacts = contacts_of(endpoint, peers)
    watcher = make_watcher(endpoint, directory, contacts, rng=random.Random())
    with ungrouped():
        async with endpoint, anyio.create_task_group() as tasks:
            tasks.start_soon(watcher.run)
            if upgrades is not None:
                tasks.start_soon(upgrades.run)
            await watcher.wait_for(lambda _: True, config.handshake_s)
            yield endpoint, watcher
            tasks.cancel_scope.cancel()


async def look_at_swarm(config: SwarmConfig, peers: Sequence[str]) -> Look:
    """Look once at a swarm, and measure the way to each of its servers.

    Args:
        config: How to talk to it; in a private swarm, with the invite.
        peers: Addresses of its peers.

    Raises:
        UsageError: If the invite is none, or an address cannot be read.
        BootstrapFailed: If no peer answers.
        NotAMember: If the swarm turns this peer away.
    """
    async with watching(config, peers) as (endpoint, watcher):
        snapshot, pings = watcher.snapshot(), Pings(endpoint)
        room = anyio.Semaphore(_PINGS_AT_ONCE)
        rtts_s: dict[PeerId, float] = {}

        async def measure(server: Announcement) -> None:
            async with room:
                try:
                    rtts_s[server.peer] = await pings.ping(server.peer, server.addresses)
                except Error:
                    return

        async with anyio.create_task_group() as tasks:
            for server in snapshot.announcements:
                tasks.start_soon(measure, server)
        return Look(snapshot, rtts_s, watcher.view.directory.dropped)

"""A peer that serves no blocks: others enter the swarm by it, learn from it how they are seen, and are reached by it.

It needs no torch, so any small machine with a public address can be one.
"""

import random
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Literal

import anyio

from corolla.errors import ungrouped
from corolla.swarm.channel import Channel
from corolla.swarm.config import LightConfig, RelayConfig, SwarmConfig
from corolla.swarm.directory.directory import Directory
from corolla.swarm.directory.keeping import make_presence
from corolla.swarm.endpoint import Endpoint
from corolla.swarm.finding.contacts import contacts_of
from corolla.swarm.identity import Identity
from corolla.swarm.members.spreading import spread_revocations
from corolla.swarm.reach.reach import Reach
from corolla.swarm.reach.reachability import Verdict
from corolla.swarm.reach.relay import RelayLoad
from corolla.swarm.transports.tls import TlsTransport
from corolla.terms import Address, PeerId, RelayOffer, Snapshot
from corolla.wire import ReachMessage

__all__ = ["LightPeer", "LightStage"]

LightStage = Literal["listening", "joined", "left"]
"""How far it has come; each stage is told to whoever watches."""


class LightPeer:
    """Takes part in a swarm without serving blocks, until it is told to stop.

    Args:
        config: Where it listens.
        swarm: How to talk to the swarm.
        relay: What to do for peers that cannot be dialled.
        version: The release of Corolla that runs.

    Raises:
        ConfigError: If an address or the file of the key cannot be used.
        UsageError: If the invite is none, has expired, or is not for serving.
    """

    def __init__(
        self, config: LightConfig, *, swarm: SwarmConfig | None = None, relay: RelayConfig, version: str = ""
    ) -> None:
        self.config = config
        self._relay_config = relay
        self._version = version
        identity = Identity.load_or_create(config.identity) if config.identity else Identity.generate()
        self._swarm_config = swarm or SwarmConfig()
        tls = TlsTransport(identity, self._swarm_config)
        self._endpoint = Endpoint(identity, [tls], self._swarm_config)
        if self._endpoint.membership is not None:
            self._endpoint.membership.check_may_serve()
        contacts = contacts_of(self._endpoint, config.peers, lasts=config.identity is not None)
        directory = Directory(self._swarm_config, admits=self._endpoint.admits, wall_s=time.time)
        rng = random.Random()
        self._gossip = make_presence(self._endpoint, directory, contacts, rng=rng)
        self._reach = Reach(self._endpoint, tls, relay, snapshot=self._gossip.snapshot, contacts=contacts, rng=rng)
        self._stop = anyio.Event()

    @property
    def peer_id(self) -> PeerId:
        """Who this peer is."""
        return self._endpoint.peer_id

    @property
    def addresses(self) -> tuple[Address, ...]:
        """Where it can be reached."""
        return self._endpoint.addresses

    @property
    def verdict(self) -> Verdict:
        """Whether it can be dialled; a relay that cannot is of no use."""
        return self._reach.verdict

    @property
    def relay_load(self) -> RelayLoad | None:
        """What it does for others; ``None`` if it is no relay."""
        return self._reach.relay_load

    def snapshot(self) -> Snapshot:
        """Give the present view of the swarm."""
        return self._gossip.snapshot()

    def stop(self) -> None:
        """Ask it to leave. Doing it twice does no harm."""
        self._stop.set()

    async def run(self, watch: Callable[[LightStage], Awaitable[None]] | None = None) -> None:
        """Live: from listening to having left.

        Args:
            watch: Hears of each stage as it is reached.

        Raises:
            ConfigError: If it cannot listen where it should.
            BootstrapFailed: If none of the given peers answers.
            NotAMember: If the swarm turns this peer away.
        """

        async def reach(stage: LightStage) -> None:
            if watch is not None:
                await watch(stage)

        with ungrouped():
            async with self._endpoint, anyio.create_task_group() as tasks:
                announce = tuple(Address(address) for address in self.config.announce)
                listener = await self._endpoint.listen("tls", self.config.host, self.config.port, announce=announce)
                if not announce:
                    self._reach.watch(listener, self.config.host)
                await reach("listening")
                tasks.start_soon(self._endpoint.serve, self._serve)
                await self._gossip.join()
                await self._announce()
                tasks.start_soon(self._gossip.run)
                tasks.start_soon(
                    partial(spread_revocations, self._endpoint, self._gossip.snapshot, rng=random.Random())
                )
                tasks.start_soon(self._reach.run, self._gossip.move)
                await reach("joined")
                await self._stop.wait()
                await self._gossip.leave()
                tasks.cancel_scope.cancel()
        await reach("left")

    async def _serve(self, channel: Channel) -> None:
        async for received in channel:
            if isinstance(received.message, ReachMessage):
                await self._reach.handle(channel, received.message)
            else:
                await self._gossip.handle(channel, received.message)

    async def _announce(self) -> None:
        if self._relay_config.enabled:
            offer = RelayOffer(
                peer=self.peer_id,
                sequence=0,  # gossip gives it the next one
                ttl_s=self._swarm_config.ttl_s,
                addresses=self.addresses,
                version=self._version,
                name=self.config.name,
            )
            await self._gossip.announce(offer)

"""The swarm as one client sees it: its endpoint, its view of the directory, and whom it keeps away from.

Owns the client's endpoint and bans. Knows nothing of tensors.
"""

import logging
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Self

import anyio

from corolla.client.config import ClientConfig
from corolla.client.gather import gather
from corolla.errors import Error, NoChain, SwarmError, ungrouped
from corolla.routing import Bans, Demand, find_chain
from corolla.swarm import (
    Channel,
    Contacts,
    Directory,
    Endpoint,
    Identity,
    Pings,
    SwarmConfig,
    TlsTransport,
    Watcher,
    spread_revocations,
)
from corolla.swarm.transport import Transport
from corolla.telemetry import event, logger
from corolla.terms import Announcement, Chain, Hop, ModelId, PeerId, Snapshot, Span

__all__ = ["AsyncSwarm", "ModelRouter", "Target"]

_LOG = logger(__name__)
_PING_EVERY_S = 10.0
_PINGS_AT_ONCE = 8


class AsyncSwarm:
    """A client's place in a swarm. Use it as an async context manager.

    Args:
        peers: Addresses of one or more peers of the swarm, as ``tls://host:port`` or ``tls://host:port/<peer id>``.
        config: How to talk to servers.
        swarm_config: How to talk to the swarm.
        transport: Makes this peer's way of sending bytes; ``None`` for TLS over TCP.

    Raises:
        ConfigError: If an address cannot be read.
    """

    def __init__(
        self,
        peers: Sequence[str],
        *,
        config: ClientConfig | None = None,
        swarm_config: SwarmConfig | None = None,
        transport: Callable[[Identity], Transport] | None = None,
    ) -> None:
        self.config = config or ClientConfig()
        self._swarm_config = swarm_config or SwarmConfig()
        identity = Identity.generate()  # a client needs no name that lasts
        make = transport or (lambda identity: TlsTransport(identity, self._swarm_config))
        self._endpoint = Endpoint(identity, [make(identity)], self._swarm_config)
        membership = self._endpoint.membership
        directory = Directory(self._swarm_config, admits=membership.admits if membership else None)
        contacts = Contacts([*peers, *(membership.invite.peers if membership else ())])
        self._watcher = Watcher(self._endpoint, directory, contacts, rng=random.Random())
        self._pings = Pings(self._endpoint)
        self._bans = Bans()
        self._stack = AsyncExitStack()
        self._failure: Error | None = None
        self._closers: set[Callable[[], Awaitable[None]]] = set()

    async def __aenter__(self) -> Self:
        """Enter the swarm.

        Raises:
            BootstrapFailed: If none of the given peers answers.
        """
        with ungrouped():
            await self._enter()
        return self

    async def _enter(self) -> None:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._endpoint)
            tasks = await stack.enter_async_context(anyio.create_task_group())
            stack.callback(tasks.cancel_scope.cancel)
            with anyio.CancelScope() as waiting:
                tasks.start_soon(self._follow, waiting)
                await self._watcher.wait_for(lambda _: True, self._swarm_config.handshake_s)
            if self._failure is not None:
                raise self._failure
            tasks.start_soon(self._ping_often)
            tasks.start_soon(partial(spread_revocations, self._endpoint, self.snapshot, rng=random.Random()))
            self._stack = stack.pop_all()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End what is still open, and leave."""
        with anyio.CancelScope(shield=True):  # bounded: whoever closes has limits of its own
            await gather([(close, ()) for close in self._closers])
        await self._stack.aclose()

    def close_with(self, close: Callable[[], Awaitable[None]]) -> None:
        """Have something closed when this peer leaves, if it was not before; see :meth:`closed`.

        Args:
            close: What to call; doing so twice must do no harm.
        """
        self._closers.add(close)

    def closed(self, close: Callable[[], Awaitable[None]]) -> None:
        """Take :meth:`close_with` back."""
        self._closers.discard(close)

    def snapshot(self) -> Snapshot:
        """Give the present view of the swarm."""
        return self._watcher.snapshot()

    def dial(self, hop: Hop) -> AbstractAsyncContextManager[Channel]:
        """Open a channel to a hop's peer, or take an idle one."""
        return self._endpoint.channel(hop.peer, hop.addresses)

    async def find_chain(self, demand: Demand) -> Chain:
        """Choose a chain; if blocks are missing, wait a while for a server that brings them.

        Banned peers are used only if there is no chain without them.

        Args:
            demand: What the chain must offer.

        Raises:
            NoChain: If blocks are still missing after ``config.chain_s``.
        """
        demand = replace(demand, dtype=demand.dtype or self.config.dtype)
        chains: list[Chain] = []
        failures: list[NoChain] = []

        def is_covered(snapshot: Snapshot) -> bool:
            never = self._ruled_out(snapshot).union(demand.avoid)
            for avoid in (never | self._bans.banned(time.monotonic()), never):
                try:
                    chains.append(find_chain(snapshot, replace(demand, avoid=avoid), self._rtts_s(snapshot)))
                except NoChain as error:
                    failures.append(error)
                else:
                    return True
            return False

        try:
            await self._watcher.wait_for(is_covered, self.config.chain_s)
        except SwarmError:
            raise failures[-1] if failures else NoChain("the swarm cannot be seen any more") from None
        event(_LOG, "chain chosen", chain=" ".join(f"{hop.peer[:8]}={hop.span}" for hop in chains[-1].hops))
        return chains[-1]

    def blame(self, peer: PeerId, error: Error) -> None:
        """Keep away from a peer for as long as the error says."""
        self._bans.ban(peer, error.ban_s, time.monotonic())

    def praise(self, peer: PeerId) -> None:
        """Forget a peer's failures, because it has just succeeded."""
        self._bans.forgive(peer)

    def _ruled_out(self, snapshot: Snapshot) -> frozenset[PeerId]:
        """List the servers that the user does not want."""
        allow, avoid = self.config.allow_peers, self.config.avoid_peers
        peers = (server.peer for server in snapshot.announcements)
        return frozenset(peer for peer in peers if peer in avoid or (allow and peer not in allow))

    def _rtts_s(self, snapshot: Snapshot) -> dict[PeerId, float]:
        measured = ((server.peer, self._pings.rtt_s(server.peer)) for server in snapshot.announcements)
        return {peer: rtt_s for peer, rtt_s in measured if rtt_s is not None}

    async def _follow(self, waiting: anyio.CancelScope) -> None:
        """Keep the view up to date; if that cannot even begin, end the wait for it."""
        try:
            await self._watcher.run()
        except Error as error:
            self._failure = error
            waiting.cancel()

    async def _ping_often(self) -> None:
        """Measure the way to every server, new ones soon; the channels stay open for sessions."""
        measured_s: dict[PeerId, float] = {}
        while True:
            now_s = time.monotonic()
            due = [server for server in self.snapshot().announcements if measured_s.get(server.peer, 0.0) < now_s]
            async with anyio.create_task_group() as tasks:
                for server in due[:_PINGS_AT_ONCE]:
                    measured_s[server.peer] = now_s + _PING_EVERY_S
                    tasks.start_soon(self._ping, server)
            await anyio.sleep(0.2 if due else 1.0)

    async def _ping(self, server: Announcement) -> None:
        try:
            await self._pings.ping(server.peer, server.addresses)
        except Error as error:
            self.blame(server.peer, error)
            event(_LOG, "ping failed", level=logging.DEBUG, peer=server.peer[:8], code=error.code)


@dataclass(frozen=True, slots=True)
class Target:
    """What a client wants run, and how its tensors should travel.

    Args:
        model: The weights.
        span: The blocks.
        codec: The name of the codec for activations, both ways.
    """

    model: ModelId
    span: Span
    codec: str


class ModelRouter:
    """Chooses chains for one purpose; peers that failed in it are not asked again for it.

    Args:
        swarm: Where to look.
        target: Which blocks of which weights to cover.
        tokens: KV tokens that each server must have free.

    Attributes:
        span: The blocks that are still to be covered; the caller narrows it while the work proceeds.
    """

    def __init__(self, swarm: AsyncSwarm, target: Target, *, tokens: int = 0) -> None:
        self._swarm = swarm
        self._model = target.model
        self.span = target.span
        self._tokens = tokens
        self._failed: set[PeerId] = set()

    async def find_chain(self) -> Chain:
        """Choose a chain over what is left of the span.

        Raises:
            NoChain: If some blocks have no server that has not failed already.
        """
        demand = Demand(model=self._model, span=self.span, tokens=self._tokens, avoid=self._failed)
        return await self._swarm.find_chain(demand)

    def blame(self, peer: PeerId, error: Error) -> None:
        """Avoid a peer: here at once, unless it may succeed itself; elsewhere for as long as the error says."""
        if error.retry == "other":
            self._failed.add(peer)
        self._swarm.blame(peer, error)

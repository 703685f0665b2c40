"""The swarm as one client sees it: its endpoint, its view of the directory, and whom it keeps away from.

Owns the client's endpoint and bans. Knows nothing of tensors.
"""

import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import anyio

from corolla.client.adapting import Deliveries
from corolla.client.config import ClientConfig
from corolla.client.gather import gather
from corolla.client.measuring import any_answers, measure_often
from corolla.client.target import Target
from corolla.errors import AdapterMissing, Error, NoChain, NotAMember, SwarmError, ungrouped
from corolla.routing import (
    Bans,
    Demand,
    Experience,
    Known,
    Lane,
    Work,
    candidates,
    find_chain,
    find_chains,
    predict_s,
)
from corolla.swarm import (
    Channel,
    Directory,
    Endpoint,
    Identity,
    Pings,
    SwarmConfig,
    TlsTransport,
    contacts_of,
    dial_through_relays,
    make_watcher,
    spread_revocations,
)
from corolla.swarm.transports.transport import Transport
from corolla.telemetry import event, logger
from corolla.terms import Announcement, Chain, Hop, ModelId, PeerId, Snapshot, Span

if TYPE_CHECKING:
    from anyio.abc import TaskGroup

__all__ = ["AsyncSwarm", "ModelRouter"]

_LOG = logger(__name__)
_MOST_WANTED = 4
"""Models whose servers are measured ahead of their use."""
_LANES_KEPT_S = 10.0
_LEAST_WAIT_S = 0.05
"""How long a busy peer is left alone, however soon it says to come back."""
_Choice = TypeVar("_Choice")


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
        own = make(identity)
        self._endpoint = Endpoint(identity, [own], self._swarm_config)
        self.peer_id = identity.peer_id  # who servers see
        self._upgrades = dial_through_relays(self._endpoint, own)
        directory = Directory(self._swarm_config, admits=self._endpoint.admits, wall_s=time.time)
        self._watcher = make_watcher(self._endpoint, directory, contacts_of(self._endpoint, peers), rng=random.Random())
        self._pings = Pings(self._endpoint)
        self._bans = Bans()
        self._experience = Experience()
        self._rng = random.Random()
        self._deliveries = Deliveries()
        self._wanted: dict[ModelId, Demand] = {}
        self._lanes: dict[tuple[ModelId, Span, int], tuple[Sequence[Lane], float]] = {}
        self._stack = AsyncExitStack()
        self._tasks: TaskGroup
        self._failure: Error | None = None
        self._closers: set[Callable[[], Awaitable[None]]] = set()

    async def __aenter__(self) -> Self:
        """Enter the swarm.

        Raises:
            BootstrapFailed: If none of the given peers answers.
            NotAMember: If the swarm turns this peer away.
        """
        with ungrouped():
            await self._enter()
        return self

    async def _enter(self) -> None:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._endpoint)
            self._tasks = tasks = await stack.enter_async_context(anyio.create_task_group())
            stack.callback(tasks.cancel_scope.cancel)
            with anyio.CancelScope() as waiting:
                tasks.start_soon(self._follow, waiting)
                await self._watcher.wait_for(lambda _: True, self._swarm_config.handshake_s)
            if self._failure is not None:
                raise self._failure
            tasks.start_soon(measure_often, self._pings, self._worth_measuring, self.blame)
            tasks.start_soon(self._keep_membership)
            if self._upgrades is not None:
                tasks.start_soon(self._upgrades.run)
            self._stack = stack.pop_all()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End what is still open, and leave."""
        with anyio.CancelScope(shield=True):  # bounded: whoever closes has limits of its own
            await gather([(close, ()) for close in self._closers])
        await self._stack.aclose()

    def start(self, function: Callable[..., Coroutine[Any, Any, None]], *args: object) -> None:
        """Run something beside everything else, until it ends or this peer leaves."""
        self._tasks.start_soon(function, *args)

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

    def dial(self, hop: Hop, *, is_new: bool = False) -> AbstractAsyncContextManager[Channel]:
        """Open a channel to a hop's peer, or take an idle one unless it must be new."""
        return self._endpoint.channel(hop.peer, hop.addresses, is_new=is_new)

    async def reaches_anybody(self, within_s: float) -> bool:
        """Say whether any server can be reached at all; if not, this machine's own connection is lost."""
        return await any_answers(self._endpoint, self.snapshot().announcements, within_s)

    async def equip(self, hop: Hop, target: Target) -> None:
        """Send a hop's peer what it has not got of what is added to its blocks.

        Raises:
            Error: What the peer said, or how it failed.
        """
        if target.adapter is None or not target.hashes(hop.span):
            return
        servers = [one for one in self.snapshot().announcements if one.peer == hop.peer]
        if not any(self._deliveries.may_have(one) for one in servers):
            async with self.dial(hop) as channel:
                await self._deliveries.deliver(channel, target.model, target.adapter, hop.span, self.config.request_s)

    async def find_chain(self, demand: Demand, *, wait_s: float | None = None) -> Chain:
        """Choose the chain of least predicted time; if blocks are missing, wait a while for a server that brings them.

        Banned peers are used only if there is no chain without them.

        Args:
            demand: What the chain must offer, besides what the configuration says.
            wait_s: How long to wait for missing blocks; ``None`` for ``config.chain_s``.

        Raises:
            NoChain: If blocks are still missing then.
        """
        chosen = await self._choose(partial(find_chain, config=self.config, rng=self._rng), demand, wait_s)
        self._bans.use((hop.peer for hop in chosen.hops), time.monotonic())
        predicted_s = predict_s(chosen, self.snapshot(), demand, self._known(), self.config)
        shown = " ".join(f"{hop.peer[:8]}={hop.span}" for hop in chosen.hops)
        event(_LOG, "chain chosen", chain=shown, predicted_s=round(predicted_s, 4))
        return chosen

    async def find_chains(self, demand: Demand, limit: int) -> Sequence[Lane]:
        """Choose chains that, used at once, answer as many of the demanded requests a second as possible.

        The choice stands for some seconds, unless one of its servers is banned: steps of a training are alike.

        Args:
            demand: What one request asks for, besides what the configuration says.
            limit: How many chains there may be.

        Raises:
            NoChain: If blocks are still missing after ``config.chain_s``.
        """
        key = demand.model, demand.span, limit
        lanes, until_s = self._lanes.get(key, ((), 0.0))
        if time.monotonic() >= until_s or any(self.avoids(lane.chain) for lane in lanes):
            lanes = await self._choose(
                partial(find_chains, limit=limit, config=self.config, rng=self._rng), demand, None
            )
            self._lanes = {key: (lanes, time.monotonic() + _LANES_KEPT_S)}
            rate = round(sum(lane.requests_per_s for lane in lanes), 3)
            event(_LOG, "chains chosen", chains=len(lanes), requests_per_s=rate)
        self._bans.use((hop.peer for lane in lanes for hop in lane.chain.hops), time.monotonic())
        return lanes

    def avoids(self, chain: Chain) -> bool:
        """Say whether a chain has a hop that is banned now."""
        banned = self._bans.banned(time.monotonic())
        return any(hop.peer in banned for hop in chain.hops)

    def learn(self, peer: PeerId, work: Work) -> None:
        """Take into account what a peer has done, and how long it took; that it has done it clears its name."""
        self.praise(peer)
        self._experience.note(peer, work, time.monotonic(), self._pings.rtt_s(peer))

    def forget_load(self, peer: PeerId) -> None:
        """Believe no longer what a peer has said of its load, as a session has left it since."""
        self._experience.forget_load(peer)

    def blame(self, peer: PeerId, error: Error) -> None:
        """Keep away from a peer for as long as the error says, and give it anew what it says it lacks."""
        if isinstance(error, AdapterMissing):
            self._deliveries.forget(peer)
        self._bans.ban(peer, error.ban_s, time.monotonic())

    def praise(self, peer: PeerId) -> None:
        """Forget a peer's failures, because it has just succeeded."""
        self._bans.forgive(peer)

    async def _choose(
        self, find: Callable[[Snapshot, Demand, Known], _Choice], demand: Demand, wait_s: float | None
    ) -> _Choice:
        self._want(demand)
        demand = self._constrained(demand)
        chosen: list[_Choice] = []
        failures: list[NoChain] = []

        def is_covered(snapshot: Snapshot) -> bool:
            known = self._known()
            snapshot = self._experience.freshen(snapshot, time.monotonic())
            for banned in (self._bans.banned(time.monotonic()), frozenset()):
                try:
                    chosen.append(find(snapshot, replace(demand, avoid=banned.union(demand.avoid)), known))
                except NoChain as error:
                    failures.append(error)
                else:
                    return True
            return False

        try:
            await self._watcher.wait_for(is_covered, self.config.chain_s if wait_s is None else wait_s)
        except SwarmError:
            raise failures[-1] if failures else NoChain("the swarm cannot be seen any more") from None
        return chosen[-1]

    def _want(self, demand: Demand) -> None:
        """Remember what was asked for, so that whoever may come to be used for it is measured."""
        known = self._wanted.pop(demand.model, None)
        if known is None or demand.span.covers(known.span):
            known = self._constrained(replace(demand, avoid=()))
        self._wanted[demand.model] = known
        if len(self._wanted) > _MOST_WANTED:
            del self._wanted[next(iter(self._wanted))]

    def _constrained(self, demand: Demand) -> Demand:
        """Add what the configuration demands of all servers."""
        config = self.config
        return replace(
            demand,
            precision=demand.precision or config.precision,
            allow=frozenset(map(PeerId, config.allow_peers)),
            avoid=frozenset(demand.avoid).union(map(PeerId, config.avoid_peers)),
            trusted=frozenset(map(PeerId, config.trusted_peers)),
            trust=config.trust,
        )

    def _known(self) -> Known:
        return self._experience.known(self._pings.rtts_s, time.monotonic())

    def _worth_measuring(self) -> list[Announcement]:
        """List the servers that may come to be used: for what was asked for before, or else for whole models."""
        snapshot, known = self.snapshot(), self._known()
        whole = {server.model: Span(0, server.num_blocks) for server in snapshot.announcements}
        demands = [*self._wanted.values()] or [
            self._constrained(Demand(model=model, span=span)) for model, span in [*whole.items()][:_MOST_WANTED]
        ]
        return [server for demand in demands for server in candidates(snapshot, demand, known, self.config)]

    async def _keep_membership(self) -> None:
        """In a private swarm, hear who was revoked; if it is this client itself, servers say so when they are asked."""
        try:
            await spread_revocations(self._endpoint, self.snapshot, rng=random.Random())
        except NotAMember as error:
            _LOG.warning("%s", error.message)

    async def _follow(self, waiting: anyio.CancelScope) -> None:
        """Keep the view up to date; if that cannot even begin, end the wait for it."""
        try:
            await self._watcher.run()
        except Error as error:
            self._failure = error
            waiting.cancel()


class ModelRouter:
    """Chooses chains for one purpose.

    Peers that failed in it are not asked again for it. Busy ones are left alone until they expect to have room, and
    waited for if there is no other, as long as that is within ``config.chain_s`` of the first that was busy.

    Args:
        swarm: Where to look.
        demand: What chains must offer.
        first: What to choose first; ``None`` for what is best then.

    Attributes:
        span: The blocks that are still to be covered.
        reason: Why the latest chain was chosen.
    """

    def __init__(self, swarm: AsyncSwarm, demand: Demand, *, first: Chain | None = None) -> None:
        self._swarm = swarm
        self._demand = demand
        self._first = first
        self._failed: set[PeerId] = set()
        self._busy_until_s: dict[PeerId, float] = {}
        self._patient_until_s: float | None = None
        self.span = demand.span
        self.reason = ""

    async def find_chain(self) -> Chain:
        """Choose a chain over what is left of the span.

        Raises:
            NoChain: If some blocks have no server that has not failed already, or is busy for too long.
        """
        first, self._first = self._first, None
        if first is not None and not self._swarm.avoids(first):
            return first
        while True:
            now_s = time.monotonic()
            busy = {peer: until_s - now_s for peer, until_s in self._busy_until_s.items() if until_s > now_s}
            demand = replace(self._demand, span=self.span, avoid=self._failed.union(busy, self._demand.avoid))
            left_s = self._swarm.config.chain_s
            if self._patient_until_s is not None:
                left_s = max(0.0, self._patient_until_s - now_s)
            try:
                chain = await self._swarm.find_chain(demand, wait_s=min([left_s, *busy.values()]))
            except NoChain as error:
                if not busy or min(busy.values()) >= left_s:
                    error.message += f"; {len(busy)} are busy" if busy else ""
                    raise
            else:
                failed = f", without {len(self._failed)} that failed" if self._failed else ""
                self.reason = f"least predicted time{failed}"
                return chain

    def advance(self, block: int) -> None:
        """Leave the blocks before this one behind, because they are done."""
        self.span = Span(block, self.span.stop)
        self._patient_until_s = None

    def forgive(self, peer: PeerId) -> None:
        """Take back :meth:`blame`: the peer has what it was asked for after all."""
        self._failed.discard(peer)
        self._swarm.praise(peer)

    def blame(self, peer: PeerId, error: Error) -> None:
        """Avoid a peer: here at once, unless it may succeed itself; elsewhere for as long as the error says."""
        now_s = time.monotonic()
        if self._patient_until_s is None and error.retry_after_s is not None:
            self._patient_until_s = now_s + self._swarm.config.chain_s
        if error.retry_after_s is not None and now_s < (self._patient_until_s or now_s):
            self._busy_until_s[peer] = now_s + max(error.retry_after_s, _LEAST_WAIT_S)
        elif error.retry == "other":
            self._failed.add(peer)
        self._swarm.blame(peer, error)

"""The life of a server: join, claim a span, load it, serve it, drain, leave.

Owns the order of these, and what is announced at each. What a stream is answered is in ``server/handler.py``.
"""

import random
import time
from collections.abc import Awaitable, Callable
from functools import partial

import anyio

from corolla import __version__
from corolla.engine import Engine, EngineConfig, Load, computing_threads
from corolla.errors import CapacityError, ModelError, ungrouped
from corolla.hub import HubConfig, Progress, stay_silent
from corolla.replay import Store
from corolla.routing import PlacementConfig, claims_before
from corolla.server.adapters import AdapterStore
from corolla.server.config import ServerConfig
from corolla.server.handler import Handler
from corolla.server.hosting import host_all
from corolla.server.life import Life, Stage
from corolla.server.loading import Model, open_model
from corolla.server.metrics import ServerMetrics
from corolla.server.outlet import Outlet
from corolla.server.rebalancing import Rebalancer
from corolla.server.speeds import SpeedFile, scaled
from corolla.server.successors import Successors
from corolla.server.tenure import Tenure
from corolla.sharing import Shelf
from corolla.swarm import (
    Contact,
    Contacts,
    Directory,
    Endpoint,
    Identity,
    Meeting,
    Reach,
    RelayConfig,
    RelayLoad,
    SwarmConfig,
    TlsTransport,
    Topic,
    contacts_of,
    make_presence,
    spread_revocations,
)
from corolla.swarm.members.invite import SwarmId
from corolla.swarm.transports.transport import Transport
from corolla.telemetry import event, logger
from corolla.terms import Address, Announcement, PeerId, ServerState, Span, Speed

__all__ = ["Server"]

_LOG = logger(__name__)
_LOOK_S = 0.5  # how often this server looks whether its load has changed so much that others should hear of it

_SETTLE_MOVE = 4
"""An announced move has so many times the time of a claim to spread before the server sets out."""


class Server:
    """Serves a span of a model's blocks until it is told to stop.

    Args:
        config: What to serve, and where.
        engine: How to compute.
        swarm: How to talk to the swarm.
        hub: Where models are kept.
        relay: What to do for peers that cannot be dialled.
        transport: How bytes travel; ``None`` for TLS over TCP.

    Attributes:
        span: The blocks, once they are claimed.
        metrics: For Prometheus.
        met: The peers that it has found by itself before it joined.
        is_founder: Whether it has started a swarm of its own, as it found none to join.
    """

    def __init__(
        self,
        config: ServerConfig,
        *,
        engine: EngineConfig | None = None,
        swarm: SwarmConfig | None = None,
        hub: HubConfig | None = None,
        relay: RelayConfig | None = None,
        transport: Callable[[Identity], Transport] | None = None,
    ) -> None:
        self.config = config
        self._engine_config = engine or EngineConfig()
        self._swarm_config = swarm or SwarmConfig()
        self._hub_config = hub or HubConfig()
        self._identity = Identity.load_or_create(config.identity) if config.identity else Identity.generate()
        make = transport or (lambda identity: TlsTransport(identity, self._swarm_config))
        self._transport = make(self._identity)
        self._endpoint = Endpoint(self._identity, [self._transport], self._swarm_config)
        if self._endpoint.membership is not None:
            self._endpoint.membership.check_may_serve()
        known = contacts_of(self._endpoint, config.peers, lasts=config.identity is not None)
        self._contacts = Contacts() if config.new_swarm else known
        rng = random.Random()
        directory = Directory(self._swarm_config, admits=self._endpoint.admits, wall_s=time.time)
        self._gossip = make_presence(self._endpoint, directory, self._contacts, rng=rng)
        self._relay_config = relay or RelayConfig()
        self._reach = Reach(
            self._endpoint,
            self._transport,
            self._relay_config,
            snapshot=self._gossip.snapshot,
            contacts=self._contacts,
            rng=rng,
        )
        self._successors = Successors(self._endpoint, self._gossip.snapshot)
        self._stop = anyio.Event()
        outlet = Outlet(self._endpoint, Store(config.log_bytes), resume_s=config.resume_s)
        adapters = AdapterStore(config.adapter_bytes, Shelf(self._hub_config.adapters, config.shelf_bytes))
        self._handler = Handler(
            self._gossip, outlet, lease_s=config.lease_s, reach=self._reach, limits=config.limits, adapters=adapters
        )
        self.metrics = ServerMetrics(self._handler.refused, lambda: self.relay_load)
        self._model: Model | None = None
        self._tenure: Tenure | None = None
        self._engine: Engine | None = None
        self._loading: Tenure | None = None
        self._state: ServerState = "joining"
        self._next_span: Span | None = None
        self.span: Span | None = None
        self._expected_speed: Speed | None = None
        self._speeds: SpeedFile | None = None
        self.met: list[Contact] = []
        self.is_founder = False

    @property
    def peer_id(self) -> PeerId:
        """Who this server is."""
        return self._identity.peer_id

    @property
    def addresses(self) -> tuple[Address, ...]:
        """Where this server listens; empty before it does."""
        return self._endpoint.addresses

    @property
    def swarm_id(self) -> SwarmId | None:
        """Which private swarm this server is in; ``None`` for a public one."""
        return None if self._endpoint.membership is None else self._endpoint.membership.swarm

    @property
    def speed(self) -> Speed | None:
        """How fast this server is, or expects to be once it has loaded its blocks; ``None`` if it cannot know."""
        return self._expected_speed if self._engine is None else self._engine.speed

    @property
    def load(self) -> Load | None:
        """How busy this server is; ``None`` before it can compute."""
        return None if self._engine is None else self._engine.load

    @property
    def is_hidden(self) -> bool:
        """Whether other peers have tried to dial this one and could not."""
        return self._reach.verdict == "hidden"

    @property
    def relay_load(self) -> RelayLoad | None:
        """What this server does for peers that cannot be dialled; ``None`` if it is no relay."""
        return self._reach.relay_load

    def stop(self) -> None:
        """Ask the server to drain and leave. Doing it twice does no harm."""
        self._stop.set()

    async def drop_sessions(self, client: PeerId | None = None) -> None:
        """Lose what a client's sessions hold, or all, and their streams, as by a crash; for tests and benchmarks."""
        await self._handler.drop_sessions(client)

    async def run(
        self, watch: Callable[[Stage], Awaitable[None]] | None = None, report: Progress = stay_silent
    ) -> None:
        """Live: from listening to having left.

        Args:
            watch: Hears of each stage as it is reached.
            report: Hears of downloads and loading, from a thread.

        Raises:
            ConfigError: If it cannot listen where it should.
            BootstrapFailed: If none of the given peers answers.
            NotAMember: If the swarm turns this peer away.
            ModelError: If the model cannot be served.
            CapacityError: If it does not fit.
        """

        async def reach(stage: Stage) -> None:
            event(_LOG, stage, peer=self.peer_id[:8], span=self.span)
            if watch is not None:
                await watch(stage)

        with ungrouped():
            await self._live(reach, report)
        await reach("left")

    async def _live(self, reach: Callable[[Stage], Awaitable[None]], report: Progress) -> None:
        host, is_apart = self.config.host, self.config.new_swarm
        meeting = Meeting(self._endpoint, self._contacts, host=host, is_apart=is_apart)

        async def moved(addresses: tuple[Address, ...]) -> None:
            await self._gossip.move(addresses)
            await reach("reached")

        async with self._endpoint, meeting, anyio.create_task_group() as tasks:
            announce = tuple(Address(address) for address in self.config.announce)
            scheme = self._transport.scheme
            listener = await self._endpoint.listen(scheme, self.config.host, self.config.port, announce=announce)
            if not announce:
                self._reach.watch(listener, self.config.host)
            await reach("listening")
            tasks.start_soon(self._endpoint.serve, self._handler.serve)
            model = self._model = await anyio.to_thread.run_sync(self._open_model, report)
            topic = Topic(self.swarm_id, model.repository.model_id)
            self.met = await meeting.look(topic)
            await self._gossip.join()
            self.is_founder = not (self._contacts.given or self._gossip.snapshot().announcements)
            tasks.start_soon(meeting.run, topic, self.config.model)
            tasks.start_soon(self._gossip.run)
            tasks.start_soon(partial(spread_revocations, self._endpoint, self._gossip.snapshot, rng=random.Random()))
            tasks.start_soon(self._successors.run)
            tasks.start_soon(self._reach.run, moved)
            await reach("joined")
            span = await self._claim(model)
            tasks.start_soon(self._refresh)
            await reach("claimed")
            life = Life(tasks, reach, report)
            await self._serve_span(life, model, span)
            await self._rebalance_until_stopped(life, model)
            self._handler.is_draining = True
            self._next_span = None
            await self._announce("draining")
            await reach("draining")
            if self._tenure is not None and self._engine is not None:
                await self._remember_speed(self._engine, model, self._tenure.span)
                await self._drain(self._tenure)
            await self._gossip.leave()
            tasks.cancel_scope.cancel()

    def _open_model(self, report: Progress) -> Model:
        with computing_threads(self._engine_config):  # the test of the family computes
            model = open_model(self.config, self._hub_config, report)
        self._speeds = SpeedFile(self._hub_config.cache_dir / "speeds", model, self._engine_config.threads)
        return model

    async def _serve_span(self, life: Life, model: Model, span: Span) -> None:
        """Load a span, measure it, and let it take over from whatever was served before."""
        tenure = Tenure(model, span, self._engine_config)
        self._loading = tenure
        try:
            engine = await life.tasks.start(tenure.run, life.report)
            await life.reach("loaded")
            await self._settle_speed(engine, model, span)
            await host_all(self.config.adapters, engine.span, self._handler.adapters, model, self._hub_config)
        finally:
            self._loading = None
        self._tenure, self._engine, self.span = tenure, engine, span
        engine.on_work = self.metrics.note_work
        self._handler.take_over(engine, model.repository.model_id)
        self._handler.is_draining = False
        self._next_span = None
        await self._announce("online")
        await life.reach("online")

    async def _rebalance_until_stopped(self, life: Life, model: Model) -> None:
        rebalancer = Rebalancer(self._endpoint, self._gossip, model, PlacementConfig(), look_s=self.config.look_s)
        async with anyio.create_task_group() as rebalancing:
            if self._can_move:
                rebalancing.start_soon(rebalancer.run, partial(self._move, life, model, rebalancer))
            await self._stop.wait()
            rebalancing.cancel_scope.cancel()

    async def _move(self, life: Life, model: Model, rebalancer: Rebalancer, span: Span) -> None:
        """Serve another span: loaded beside the old one where memory allows, so that nothing is interrupted."""
        self._next_span = span
        await self._announce("online")
        await anyio.sleep(self.config.settle_s * _SETTLE_MOVE)
        if self.span is None or not await rebalancer.confirm(self.span, span):
            self._next_span = None
            await self._announce("online")
            return
        await life.reach("moving")
        old = self._tenure
        if model.has_room(span):
            try:
                await self._serve_span(life, model, span)
            except (CapacityError, ModelError) as error:
                event(_LOG, "stays, as the other blocks cannot be loaded", span=span, error=error)
                self._next_span = None
                await self._announce("online")
            else:
                if old is not None:
                    life.tasks.start_soon(self._drain, old)
            return
        self._handler.is_draining = True
        await self._announce("draining")
        if old is not None:
            await self._drain(old)
        self._handler.release()
        self._tenure = self._engine = self._next_span = None
        self.span = span
        await self._expect_speed(model, span)
        await self._announce("joining")
        await self._serve_span(life, model, span)

    async def _drain(self, tenure: Tenure) -> None:
        """Let sessions move to other servers, or finish."""
        if tenure.engine is not None:
            await self._handler.ask_to_leave(tenure.engine, self.config.drain_s)
        await tenure.end(self.config.drain_s)

    async def _settle_speed(self, engine: Engine, model: Model, span: Span) -> None:
        """Let the engine know its speed from the last time, or else measure it."""
        known = await self._expect_speed(model, span)
        if known is None:
            await engine.measure()
            await self._remember_speed(engine, model, span)
        else:
            engine.assume(known)

    async def _expect_speed(self, model: Model, span: Span) -> Speed | None:
        """Recall how fast this machine is; a token costs in proportion to the bytes of the blocks."""
        whole = None if self._speeds is None else await anyio.to_thread.run_sync(self._speeds.recall)
        self._expected_speed = whole and scaled(whole, sum(model.block_bytes) / model.needed_bytes(span))
        return self._expected_speed

    async def _remember_speed(self, engine: Engine, model: Model, span: Span) -> None:
        if engine.speed is not None and self._speeds is not None:
            whole = scaled(engine.speed, model.needed_bytes(span) / sum(model.block_bytes))
            await anyio.to_thread.run_sync(self._speeds.remember, whole)

    async def _claim(self, model: Model) -> Span:
        """Choose a span and claim it; where others claim at the same time, look again until nobody moves."""
        respected = {(server.peer, server.span) for server in self._gossip.snapshot().announcements}
        while True:
            claims = claims_before(self._gossip.snapshot(), self.peer_id, respected)
            chosen = self.config.blocks or model.choose_span(claims, self.config.num_blocks)
            if chosen == self.span:
                return chosen
            self.span = chosen
            await self._expect_speed(model, chosen)
            await self._announce("joining")
            if self.config.blocks is None:
                await anyio.sleep(self.config.settle_s)

    async def _refresh(self) -> None:
        """Look often how far and how busy this server is; others hear of it if it matters to them, or in time."""
        while True:
            await anyio.sleep(min(_LOOK_S, self._swarm_config.refresh_s))
            if (announcement := self._announcement()) is not None:
                self.metrics.note_said(announcement)
                await self._gossip.note(announcement)

    @property
    def _can_move(self) -> bool:
        return not self.config.stay and self.config.blocks is None

    async def _announce(self, state: ServerState) -> None:
        self._state = state
        if (announcement := self._announcement()) is not None:
            self.metrics.note_said(announcement)
            await self._gossip.announce(announcement)

    def _announcement(self) -> Announcement | None:
        model, span = self._model, self.span
        if model is None or span is None:
            return None
        load = self.load
        return Announcement(
            peer=self.peer_id,
            sequence=0,  # gossip gives it the next one
            ttl_s=self._swarm_config.ttl_s,
            model=model.repository.model_id,
            model_name=self.config.model[-128:],
            num_blocks=model.num_blocks,
            span=span,
            state=self._state,
            next_span=self._next_span,
            move_s=self.config.drain_s + self._tenure.load_s if self._can_move and self._tenure else None,
            progress=1.0 if self._loading is None else self._loading.progress,
            precision=model.precision,
            addresses=self.addresses,
            speed=self.speed,
            free_tokens=load.free_tokens if load else 0,
            sessions=load.sessions if load else 0,
            queue_s=round(self._engine.queue_s, 2) if self._engine else 0.0,
            rtts=self._successors.rtts,
            bytes_per_s=self._successors.bytes_per_s,
            version=__version__,
            name=self.config.name,
            adapters=self._handler.adapters.hosted,
            is_relay=self._relay_config.enabled,
        )

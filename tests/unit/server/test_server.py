"""A server's life: it joins, claims, loads, serves, lets its sessions finish, and leaves."""

from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest
import torch

from corolla.client import AsyncSwarm, ClientConfig, Session, StepTokens, Target
from corolla.engine import EngineConfig
from corolla.engine.measure import ObservedSpeed
from corolla.errors import ModelNotFound, NoChain, UsageError
from corolla.hub import HubConfig
from corolla.server import Server, ServerConfig
from corolla.server.loading import Model
from corolla.swarm import MemoryNetwork, SwarmConfig
from corolla.terms import Span, Speed
from corolla.testing import save_tiny_model

pytestmark = pytest.mark.anyio

STAGES = ["listening", "joined", "claimed", "loaded", "online", "draining", "left"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


class Life:
    """A server in a network in memory, and what it says of itself."""

    def __init__(self, network, directory, peers=(), **settings):
        config = ServerConfig(**{"model": str(directory), "host": "here", "port": 0, "peers": tuple(peers)} | settings)
        self.server = Server(
            config,
            engine=EngineConfig(threads=1, kv_bytes=1 << 20),
            swarm=SwarmConfig(refresh_s=0.1, gossip_interval_s=0.1),
            hub=HubConfig(cache_dir=Path(directory).parent / "cache"),
            transport=network.transport,
        )
        self.reached = {stage: anyio.Event() for stage in [*STAGES, "moving"]}
        self.stages = []

    async def run(self):
        await self.server.run(self.watch)

    async def watch(self, stage):
        self.stages.append(stage)
        self.reached[stage].set()

    async def until(self, stage):
        with anyio.fail_after(100):
            await self.reached[stage].wait()

    @property
    def address(self):
        return f"{self.server.addresses[0]}/{self.server.peer_id}"


@asynccontextmanager
async def living(*lives):
    """Let servers live until the end of the block at most."""
    async with anyio.create_task_group() as tasks:
        for life in lives:
            tasks.start_soon(life.run)
        yield
        for life in lives:
            life.server.stop()


def client(network, life):
    return AsyncSwarm([life.address], config=ClientConfig(codec="raw", chain_s=0.1), transport=network.transport)


def session_of(swarm, model):
    return Session(swarm, Target(model, Span(0, 4), "raw"), rows=1, max_tokens=64)


async def test_a_life_has_its_stages_in_order_and_is_announced(directory, until):
    network = MemoryNetwork()
    life = Life(network, directory, blocks=Span(0, 4), name="ada")
    async with living(life):
        await life.until("online")
        async with client(network, life) as swarm:
            (claim,) = swarm.snapshot().announcements
            assert (claim.peer, claim.span, claim.state, claim.name) == (
                life.server.peer_id,
                Span(0, 4),
                "online",
                "ada",
            )
            assert claim.speed == life.server.speed
            assert claim.free_tokens == life.server.load.free_tokens > 0
            session = session_of(swarm, claim.model)
            await session.open()
            await until(lambda: swarm.snapshot().announcements[0].sessions == 1)
            assert swarm.snapshot().announcements[0].free_tokens == claim.free_tokens - 64
            await session.close()
            life.server.stop()
            await life.until("left")
    assert life.stages == STAGES


async def test_a_restarted_server_knows_its_speed_and_learns_from_sessions(directory, tmp_path):
    network = MemoryNetwork()
    speeds = []
    for blocks in (Span(0, 4), Span(0, 2)):
        life = Life(network, directory, blocks=blocks)
        async with living(life):
            await life.until("online")
            speeds.append(life.server.speed.decode_tokens_per_s)
    assert speeds[1] == pytest.approx(2 * speeds[0], rel=0.05)
    observed = ObservedSpeed(blocks=4)
    observed.note(4, (1,), 1.0)
    assert observed.speed is None
    observed.assume(Speed(decode_tokens_per_s=100.0, prefill_tokens_per_s=1000.0))
    for _ in range(200):
        observed.note(2, (1,), 0.01)
        observed.note(4, (100,), 1.0)
    assert observed.speed.decode_tokens_per_s == pytest.approx(50.0, rel=0.05)
    assert observed.speed.prefill_tokens_per_s == pytest.approx(100.0, rel=0.05)


async def test_a_leaving_server_lets_sessions_finish_and_takes_no_new_ones(directory, until):
    network = MemoryNetwork()
    life = Life(network, directory, blocks=Span(0, 4))
    async with living(life):
        await life.until("online")
        async with client(network, life) as swarm:
            model = swarm.snapshot().announcements[0].model
            session = session_of(swarm, model)
            await session.open()
            life.server.stop()
            await life.until("draining")
            await until(lambda: swarm.snapshot().announcements[0].state == "draining")
            with pytest.raises(NoChain):
                await session_of(swarm, model).open()
            assert not life.reached["left"].is_set()
            await session.close()
            await life.until("left")


async def test_a_leaving_server_waits_no_longer_than_it_may(directory):
    network = MemoryNetwork()
    life = Life(network, directory, blocks=Span(0, 4), drain_s=0.05)
    async with living(life):
        await life.until("online")
        async with client(network, life) as swarm:
            session = session_of(swarm, swarm.snapshot().announcements[0].model)
            await session.open()
            life.server.stop()
            await life.until("left")
            await session.close()


async def test_servers_that_join_at_once_share_the_blocks(directory):
    network = MemoryNetwork()
    first = Life(network, directory, num_blocks=2)
    async with living(first):
        await first.until("online")
        others = [Life(network, directory, [first.address], num_blocks=1, settle_s=0.5) for _ in range(2)]
        async with living(*others):
            for life in others:
                await life.until("online")
            spans = [life.server.span for life in (first, *others)]
            assert {block for span in spans for block in range(span.start, span.stop)} == {0, 1, 2, 3}


async def test_the_first_server_of_a_swarm_gives_way_to_one_that_joins_meanwhile(directory):
    network = MemoryNetwork()
    first = Life(network, directory, num_blocks=2, settle_s=0.5)
    async with living(first):
        await first.until("listening")
        other = Life(network, directory, [first.address], num_blocks=2, settle_s=0.5)
        async with living(other):
            for life in (first, other):
                await life.until("online")
            assert {first.server.span, other.server.span} == {Span(0, 2), Span(2, 4)}


async def compute(swarm, model):
    """Use the whole model for a moment."""
    session = session_of(swarm, model)
    await session.open()
    await session.step(StepTokens(torch.zeros(1, 64), (0,), (1,)))
    await session.close()


def assume_speed(life):
    """Let a server be as fast as all the others, as on machines that are alike."""
    life.server._engine.assume(Speed(decode_tokens_per_s=100.0, prefill_tokens_per_s=100.0))


@pytest.mark.parametrize("has_room", [True, False])
async def test_a_server_moves_where_it_is_needed_more_and_nobody_notices(directory, monkeypatch, has_room):
    monkeypatch.setattr(Model, "has_room", lambda self, span: has_room)
    network = MemoryNetwork()
    first = Life(network, directory, blocks=Span(0, 2))
    async with living(first):
        await first.until("online")
        last = Life(network, directory, [first.address], blocks=Span(2, 4))
        mover = Life(network, directory, [first.address], num_blocks=2, look_s=0.1, settle_s=0.1)
        async with living(last, mover), client(network, first) as swarm:
            await last.until("online")
            await mover.until("online")
            here, peer, address = mover.server.span, mover.server.peer_id, mover.address
            for life in (first, last, mover):  # before there is a crowd to leave: while it moves, it has no engine
                assume_speed(life)
            model = swarm.snapshot().announcements[0].model
            crowd = [Life(network, directory, [first.address], blocks=here) for _ in range(2)]
            async with living(*crowd):
                for life in crowd:
                    await life.until("online")
                    assume_speed(life)
                with anyio.fail_after(60):
                    while mover.server.span == here or mover.stages[-1] != "online":
                        await compute(swarm, model)
                assert mover.stages == [*STAGES[:5], "moving", "loaded", "online"]
                assert (mover.server.peer_id, mover.address) == (peer, address)
                for _ in range(3):
                    await compute(swarm, model)
                assert mover.server.span == (Span(2, 4) if here == Span(0, 2) else Span(0, 2))


async def lie(life, span):
    """Let a server announce blocks that it does not serve, and a speed that nobody has."""
    life.server.span = span
    life.server._engine.assume(Speed(decode_tokens_per_s=1e12, prefill_tokens_per_s=1e12))
    await life.server._announce("online")


async def test_a_gap_that_a_liar_hides_is_found_and_closed(directory, until):
    network = MemoryNetwork()
    first = Life(network, directory, blocks=Span(0, 2))
    async with living(first):
        await first.until("online")
        liar = Life(network, directory, [first.address], blocks=Span(0, 2))
        spare = Life(network, directory, [first.address], num_blocks=2, look_s=0.1, settle_s=0.1)
        async with living(liar):
            await liar.until("online")
            await lie(liar, Span(2, 4))
            async with living(spare):
                await spare.until("claimed")
                assert spare.server.span == Span(0, 2)
                await spare.until("moving")
                await until(lambda: spare.server.span == Span(2, 4))


async def test_nobody_leaves_blocks_to_a_liar(directory, until):
    network = MemoryNetwork()
    honest = Life(network, directory, num_blocks=2, look_s=0.05, settle_s=0.1)
    async with living(honest):
        await honest.until("online")
        liar = Life(network, directory, [honest.address], blocks=Span(2, 4))
        async with living(liar), client(network, honest) as swarm:
            await liar.until("online")
            await lie(liar, Span(0, 2))
            await until(lambda: any(claim.next_span for claim in swarm.snapshot().announcements))
            await until(lambda: not any(claim.next_span for claim in swarm.snapshot().announcements))
            assert "moving" not in honest.stages
            assert honest.server.span == Span(0, 2)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"model": "/nowhere/at/all"}, ModelNotFound, "/nowhere/at/all"),
        ({"blocks": Span(2, 5)}, UsageError, "has 4 blocks, 0:4; 2:5 were asked for"),
        ({"num_blocks": 9}, UsageError, "has 4 blocks, 0:4; 9 were asked for"),
    ],
)
async def test_what_cannot_be_served_ends_the_server_with_the_reason(directory, settings, error, words):
    life = Life(MemoryNetwork(), directory, **settings)
    with pytest.raises(error, match=words):
        await life.run()
    assert life.stages == ["listening"]

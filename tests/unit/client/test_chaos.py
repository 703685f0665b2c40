"""Whatever happens in whatever order, a session's results are those of one that nothing happened to."""

# N packed tokens, D model width

from dataclasses import dataclass, field
from typing import Any

import anyio
import anyio.lowlevel
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from corolla.client import Session, StepTokens, Target
from corolla.errors import NoChain, PeerError
from corolla.terms import ModelId, Span

WIDTH, ROWS, MOST_TOKENS = 64, 3, 60
SPANS = ("0:1", "1:3", "3:4")
SERVERS = st.integers(0, 2 * len(SPANS) - 1)
TURNS = st.integers(0, 80)  # of the event loop, from the beginning of the next step


def test_any_interleaving_of_steps_and_disasters_gives_the_reference(hosts):
    run_state_machine_as_test(
        lambda: Chaos(type(hosts)),
        settings=settings(
            max_examples=settings.default.max_examples // 4,
            stateful_step_count=14,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )


class Chaos(RuleBasedStateMachine):
    """A session among six servers, two for each span, and beside it one that nothing happens to."""

    def __init__(self, make_hosts):
        super().__init__()
        self.make_hosts = make_hosts
        self.lengths = [0] * ROWS
        self.seeds = 0
        self.story = []  # played at the end, in one event loop

    def happens(self, turns, name, what=None):
        self.story.append((World.expect_disaster, (turns, name, what)))

    @rule(data=st.data())
    def step(self, data):
        """Rewind and reorder rows at will, and add tokens."""
        order = data.draw(st.none() | st.tuples(*[st.integers(0, ROWS - 1)] * ROWS)) if self.lengths[0] else None
        kept = [self.lengths[row] for row in order] if order else self.lengths
        starts = [data.draw(st.just(length) | st.integers(0, length)) for length in kept]
        counts = [data.draw(st.integers(0, 4)) for _ in starts]
        counts[0] += not sum(counts)
        lengths = [start + count for start, count in zip(starts, counts, strict=True)]
        if max(lengths) <= MOST_TOKENS:
            self.lengths, self.seeds = lengths, self.seeds + 1
            hidden_ND = torch.randn(sum(counts), WIDTH, generator=torch.Generator().manual_seed(self.seeds))
            self.story.append((World.step, (StepTokens(hidden_ND, tuple(starts), tuple(counts), order),)))

    @rule(server=SERVERS, turns=TURNS)
    def kill(self, server, turns):
        """Lose a server, which comes back after the next step and has forgotten all."""
        self.happens(turns, World.kill, server)

    @rule(server=SERVERS, turns=TURNS)
    def interrupt(self, server, turns):
        """Lose a server's streams for a moment."""
        self.happens(turns, World.interrupt, server)

    @rule(turns=TURNS)
    def cut_off(self, turns):
        """Lose the client's own connection for a moment."""
        self.happens(turns, World.interrupt)

    @rule(one=SERVERS, other=SERVERS, turns=TURNS)
    def part(self, one, other, turns):
        """Let two servers not reach each other any more."""
        if one != other:
            self.happens(turns, World.part, (one, other))

    @rule()
    def heal(self):
        """Let all reach each other."""
        self.story.append((World.heal, ()))

    @rule(server=SERVERS, turns=TURNS)
    def drain(self, server, turns):
        """Have a server hand its sessions over."""
        self.happens(turns, World.drain, server)

    @rule(turns=TURNS)
    def cancel(self, turns):
        """Give the next step up, which ends the session; another one is opened and given the same."""
        self.story.append((World.cancel, (turns,)))

    def teardown(self):
        if any(action is World.step for action, _ in self.story):
            anyio.run(play, self.make_hosts, self.story)


async def play(make_hosts, story):
    hosts, calm = make_hosts(), make_hosts()
    config = {"attempts": 20, "chain_s": 10.0, "step_s": 20.0, "resume_s": 5.0, "piece_tokens": 4}
    async with (
        hosts.chain(*SPANS, *SPANS, resume_s=1.0) as servers,
        calm.host("0:4"),
        hosts.swarm(**config) as swarm,
        calm.swarm() as calm_swarm,
    ):
        world = World(hosts, servers, swarm, await open_session(swarm), await open_session(calm_swarm))
        for action, arguments in story:
            await action(world, *arguments)
        await world.end()


@dataclass
class World:
    hosts: Any
    servers: list
    swarm: Any
    session: Session
    reference: Session
    told: list = field(default_factory=list)
    disasters: list = field(default_factory=list)
    dead: list = field(default_factory=list)

    async def step(self, tokens):
        expected = await self.reference.step(tokens)
        async with anyio.create_task_group() as tasks:
            for turns, happen, what in self.disasters:
                tasks.start_soon(after, turns, happen, self, what)
            with anyio.fail_after(60):
                found = await self.try_step(tokens)
        self.disasters.clear()
        for peer in self.dead:
            self.hosts.network.mend(peer)
        self.dead.clear()
        assert torch.allclose(found.hidden_ND, expected.hidden_ND, rtol=1e-4, atol=1e-4)
        self.told.append(tokens)

    async def try_step(self, tokens):
        """A step that failed has left no trace, and may be tried again: all servers come back."""
        for _ in range(5):
            try:
                return await self.session.step(tokens)
            except (NoChain, PeerError):
                await anyio.sleep(0.05)
        return await self.session.step(tokens)

    async def expect_disaster(self, *disaster):
        self.disasters.append(disaster)

    async def heal(self):
        self.hosts.network._separated.clear()

    async def cancel(self, turns):
        lengths = (
            [0] * ROWS
            if not self.told
            else [sum(pair) for pair in zip(self.told[-1].starts, self.told[-1].counts, strict=True)]
        )
        tokens = StepTokens(torch.ones(ROWS, WIDTH), tuple(lengths), (1,) * ROWS)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(after, turns, stop, tasks.cancel_scope, None)
            await self.session.step(tokens)
            tasks.cancel_scope.cancel()
        await self.session.close()
        self.session = await open_session(self.swarm)
        for told in self.told:
            await self.session.step(told)

    async def kill(self, server):
        server = self.servers[server]
        if all(other.peer in self.dead for other in self.servers if other is not server and spans_alike(server, other)):
            return  # somebody must have the blocks
        self.dead.append(server.peer)
        self.hosts.network.cut(server.peer)
        for session in [*server.handler._sessions]:
            session.line.give_up()

    async def interrupt(self, server):
        peer = self.swarm._endpoint.peer_id if server is None else self.servers[server].peer
        if peer not in self.dead:
            self.hosts.network.cut(peer)
            await anyio.sleep(0.01)
            self.hosts.network.mend(peer)

    async def part(self, pair):
        self.hosts.network.separate(*(self.servers[index].peer for index in pair))

    async def drain(self, server):
        await self.servers[server].handler.ask_to_leave(self.servers[server].engine, 5.0)

    async def end(self):
        await self.session.close()
        await self.reference.close()
        with anyio.fail_after(15):
            while any(host.engine.load.sessions for host in self.servers):  # noqa: ASYNC110
                await anyio.sleep(0.01)
        for host in self.servers:
            host.engine.check_integrity()


def spans_alike(one, other):
    return one.engine.span.span == other.engine.span.span


async def after(turns, happen, *what):
    for _ in range(turns):
        await anyio.lowlevel.checkpoint()
    await happen(*what)


async def stop(scope, _):
    scope.cancel()


async def open_session(swarm):
    session = Session(swarm, Target(ModelId("ab" * 32), Span(0, 4), "raw"), rows=ROWS, max_tokens=64)
    with anyio.fail_after(60):
        await session.open()
    return session

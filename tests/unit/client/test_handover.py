"""A server that leaves gives its sessions to another, bit for bit; where that cannot be, they are replayed."""

# N packed tokens, D model width

import anyio
import pytest
import torch

from corolla.client import Session, StepTokens, Target
from corolla.terms import ModelId, Span

pytestmark = pytest.mark.anyio

WIDTH = 64
SPANS = ("0:1", "1:3", "3:4")


def step(starts, counts, seed=0, order=None):
    hidden_ND = torch.randn(sum(counts), WIDTH, generator=torch.Generator().manual_seed(seed))
    return StepTokens(hidden_ND, tuple(starts), tuple(counts), order)


SCRIPT = [
    step((0, 0, 0), (40, 3, 70)),
    step((70, 40, 40), (1, 1, 1), 1, (2, 0, 0)),
    step((41, 41, 41), (1, 1, 1), 2, (1, 1, 2)),
    step((5, 42, 42), (2, 1, 1), 3),
    step((7, 43, 43), (1, 1, 1), 4, (0, 2, 1)),
]


def make_session(swarm, codec="raw"):
    return Session(swarm, Target(ModelId("ab" * 32), Span(0, 4), codec), rows=3, max_tokens=128)


async def undisturbed(hosts, codec="raw"):
    async with hosts.chain(*SPANS), hosts.swarm() as swarm:
        session = make_session(swarm, codec)
        await session.open()
        results = [(await session.step(one)).hidden_ND for one in SCRIPT]
        await session.close()
        return results


def stored(host):
    """All keys and values of a host's only session."""
    (session,) = host.handler._sessions
    return [
        tensor
        for row in session.rows.rows
        for block in session.rows.blocks.indices
        for tensor in (torch.tensor([row.length]), *row.read(block, 0, row.length))
    ]


def is_chained(session, host):
    return host.peer in {hop.peer for hop in session.chain.hops}


async def leave(host, left_s=10.0):
    host.handler.is_draining = True
    await host.announce(state="draining")
    await host.handler.ask_to_leave(host.engine, left_s)


@pytest.mark.parametrize("codec", ["raw", "half", "int8"])
@pytest.mark.parametrize("leaving", range(3))
async def test_what_a_leaving_server_holds_goes_to_another_bit_for_bit(hosts, until, leaving, codec):
    expected = await undisturbed(hosts, codec)
    async with hosts.chain(*SPANS) as chain, hosts.swarm() as swarm:
        session = make_session(swarm, codec)
        await session.open()
        async with hosts.host(SPANS[leaving]) as heir:
            await until(lambda: len(swarm.snapshot().announcements) == 4)
            results = []
            for number, one in enumerate(SCRIPT):
                if number == 2:
                    old, held = chain[leaving], stored(chain[leaving])
                    await leave(old)
                    await until(lambda: is_chained(session, heir))
                    await until(lambda old=old: old.engine.load.sessions == 0)
                    assert all(torch.equal(*pair) for pair in zip(stored(heir), held, strict=True))
                    old.engine.check_integrity()
                    heir.engine.check_integrity()
                results.append((await session.step(one)).hidden_ND)
            assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))
            assert not session.replays
            assert not swarm._bans.banned(0.0)
            await session.close()


async def test_steps_go_on_while_it_travels_and_what_they_change_travels_again(hosts, until):
    expected = await undisturbed(hosts)
    async with hosts.chain(*SPANS) as chain, hosts.swarm() as swarm, hosts.host("1:3") as spare:
        session = make_session(swarm)
        await session.open()
        old, heir = (chain[1], spare) if is_chained(session, chain[1]) else (spare, chain[1])
        (served,) = old.handler._sessions
        travelling, released = anyio.Event(), anyio.Event()
        give = type(served)._hand_over

        async def give_in_two_parts(to):
            await give(served, to)
            travelling.set()

        served._hand_over = give_in_two_parts
        restore, held_back = heir.engine.restore, []
        results = [(await session.step(SCRIPT[0])).hidden_ND]

        def note(*args):
            held_back.append(args[1:3])
            restore(*args)

        heir.engine.restore = note
        async with anyio.create_task_group() as tasks:
            await session._hops.stepping.acquire()  # as if a step were under way
            tasks.start_soon(leave, old)
            await travelling.wait()
            session._hops.stepping.release()
            results += [(await session.step(one)).hidden_ND for one in SCRIPT[1:]]
        released.set()
        await until(lambda: is_chained(session, heir))
        assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))
        assert not session.replays
        assert len(held_back) > 3, "what was reordered and rewound has travelled twice"
        await session.close()


async def test_after_a_handover_the_heir_can_replay_to_whoever_follows_it(hosts, until):
    expected = await undisturbed(hosts)
    async with hosts.chain(*SPANS) as chain, hosts.swarm() as swarm:
        session = make_session(swarm)
        await session.open()
        results = [(await session.step(one)).hidden_ND for one in SCRIPT[:2]]
        async with hosts.host("1:3") as heir, hosts.host("3:4") as last:
            await until(lambda: len(swarm.snapshot().announcements) == 5)
            await leave(chain[1])
            await until(lambda: is_chained(session, heir))
            hosts.network.cut(chain[2].peer)
            results += [(await session.step(one)).hidden_ND for one in SCRIPT[2:]]
            assert [hop.peer for hop in session.chain.hops] == [chain[0].peer, heir.peer, last.peer]
            assert [replay.hop.peer for replay in session.replays] == [last.peer], "only the last was replayed to"
            for result_ND, expected_ND in zip(results, expected, strict=True):
                assert torch.allclose(result_ND, expected_ND, rtol=1e-4, atol=1e-4)
            await session.close()


@pytest.mark.parametrize("trouble", ["apart", "full", "nobody", "heir dies"])
async def test_where_nothing_can_be_handed_over_the_session_is_replayed(hosts, until, trouble):
    expected = await undisturbed(hosts)
    async with hosts.chain(*SPANS) as chain, hosts.swarm(chain_s=5.0) as swarm:
        session = make_session(swarm)
        await session.open()
        results = [(await session.step(one)).hidden_ND for one in SCRIPT[:3]]
        old = chain[1]
        async with hosts.host("1:3") as heir:
            await until(lambda: len(swarm.snapshot().announcements) == 4)
            if trouble == "apart":
                hosts.network.separate(old.peer, heir.peer)
            elif trouble == "full":
                heir.engine.restore = full
            elif trouble == "nobody":
                await heir.announce(state="draining")
                await until(lambda: {one.state for one in swarm.snapshot().announcements} == {"online", "draining"})
            elif trouble == "heir dies":
                hosts.network.drop_after(heir.peer, 300)
            await leave(old, left_s=1.0)
            await anyio.sleep(0.3)
            results.append((await session.step(SCRIPT[3])).hidden_ND)  # with whoever has it by now
            if trouble == "nobody":
                await heir.announce()
            if old.engine.load.sessions:
                hosts.network.cut(old.peer)
            results.append((await session.step(SCRIPT[4])).hidden_ND)
            for result_ND, expected_ND in zip(results, expected, strict=True):
                assert torch.allclose(result_ND, expected_ND, rtol=1e-4, atol=1e-4)
            assert is_chained(session, heir)
            await session.close()
            await until(lambda: not any(host.engine.load.sessions for host in (chain[0], chain[2], heir)))


def full(*args):
    from corolla.errors import CacheFull

    raise CacheFull("no pages")

"""Whoever fails, whenever and how often: a session's results stay those of an undisturbed one."""

# N packed tokens, D model width

from contextlib import asynccontextmanager

import anyio
import anyio.lowlevel
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from corolla.client import Session, StepTokens, Target
from corolla.errors import NoChain, PeerBusy
from corolla.terms import ModelId, Span, Speed

pytestmark = pytest.mark.anyio

WIDTH = 64
SPANS = ("0:1", "1:3", "3:4")


def make_session(swarm, *, rows=1, codec="raw"):
    return Session(swarm, Target(ModelId("ab" * 32), Span(0, 4), codec), rows=rows, max_tokens=64)


def step(starts, counts, seed=0, order=None):
    hidden_ND = torch.randn(sum(counts), WIDTH, generator=torch.Generator().manual_seed(seed))
    return StepTokens(hidden_ND, tuple(starts), tuple(counts), order)


SCRIPTS = {
    "tokens": [step((0,), (5,)), step((5,), (1,), 1), step((6,), (1,), 2), step((7,), (2,), 3)],
    "rewinds": [step((0,), (9,)), step((4,), (2,), 1), step((6,), (1,), 2), step((0,), (3,), 3), step((3,), (1,), 4)],
    "ragged": [step((0, 0, 0), (4, 1, 7)), step((4, 1, 7), (1, 1, 1), 1), step((2, 2, 8), (3, 0, 1), 2)],
    "beams": [
        step((0, 0, 0), (3, 3, 3)),
        step((3, 3, 3), (1, 1, 1), 1, (2, 0, 0)),
        step((4, 4, 4), (1, 1, 1), 2, (1, 1, 2)),
        step((5, 5, 5), (1, 1, 1), 3, (0, 2, 1)),
        step((3, 4, 6), (2, 1, 1), 4, (1, 0, 0)),
    ],
}


def rows_of(script):
    return len(script[0].starts)


async def undisturbed(hosts, script, codec="raw", **options):
    async with hosts.chain(*SPANS), hosts.swarm(**options) as swarm:
        session = make_session(swarm, rows=rows_of(script), codec=codec)
        await session.open()
        results = [(await session.step(one)).hidden_ND for one in script]
        assert not session.replays
        await session.close()
        return results


def assert_same(results, expected, codec="raw"):
    """The very bytes are replayed; only sums may be rounded otherwise, which a codec can make a step of its own."""
    tolerance = {"raw": 1e-4, "half": 4e-3, "int8": 5e-2}[codec]
    for result_ND, expected_ND in zip(results, expected, strict=True):
        assert torch.allclose(result_ND, expected_ND, rtol=tolerance, atol=tolerance)


@asynccontextmanager
async def spares_for(hosts, until, swarm, spans):
    """Have more servers, to be chosen last, once the client knows of them."""
    slow = Speed(decode_tokens_per_s=0.01, prefill_tokens_per_s=1)
    async with hosts.chain(*spans) as spares:
        for spare in spares:
            await spare.announce(speed=slow)
        await until(lambda: [seen.speed for seen in swarm.snapshot().announcements].count(slow) == len(spans))
        yield spares


MORE = ("0:1", "1:2", "2:3", "3:4")
CASES = [
    *(("tokens", (lost,), SPANS) for lost in range(3)),
    ("tokens", (1,), MORE),
    ("rewinds", (0,), ("0:4",)),
    ("rewinds", (1, 2), ("0:4",)),
    ("rewinds", (0, 2), MORE),
    ("ragged", (0, 1), SPANS),
    ("ragged", (1,), MORE),
    ("beams", (0,), MORE),
    ("beams", (2,), ("0:4",)),
    ("beams", (0, 1, 2), SPANS),
    ("beams", (0, 1, 2), MORE),
]


@pytest.mark.parametrize(("script", "lost", "spares"), CASES)
async def test_lost_at_any_step_hops_are_replaced(hosts, until, script, lost, spares):
    """Petals defect B: no session came back, and healthy peers were banned for it."""
    script = SCRIPTS[script]
    expected = await undisturbed(hosts, script)
    for when in range(1, len(script)):
        async with (
            hosts.chain(*SPANS) as chain,
            hosts.swarm() as swarm,
            spares_for(hosts, until, swarm, spares) as others,
        ):
            session = make_session(swarm, rows=rows_of(script))
            await session.open()
            results = []
            for number, one in enumerate(script):
                if number == when:
                    for index in lost:
                        hosts.network.cut(chain[index].peer)
                results.append((await session.step(one)).hidden_ND)
            assert_same(results, expected)
            assert session.replays or not any(script[when].starts)  # where all begins anew there is nothing to replay
            gone = {chain[index].peer for index in lost}
            assert not gone & {hop.peer for hop in session.chain.hops}
            kept = {host.peer for host in chain} - gone
            assert kept <= {hop.peer for hop in session.chain.hops}, "a healthy hop keeps its place"
            assert not swarm._bans.banned(0.0) - gone, "and is not blamed"
            await session.close()
            await until(lambda: all(host.engine.load.sessions == 0 for host in [*chain, *others]))


@pytest.mark.parametrize("codec", ["raw", "half", "int8"])
async def test_a_replacement_is_fed_the_very_bytes(hosts, until, codec):
    script = SCRIPTS["rewinds"]
    expected = await undisturbed(hosts, script, codec)
    async with hosts.chain(*SPANS) as chain, hosts.swarm() as swarm, spares_for(hosts, until, swarm, SPANS):
        session = make_session(swarm, codec=codec)
        await session.open()
        results = []
        for number, one in enumerate(script):
            if number == 3:
                hosts.network.cut(chain[1].peer)
            results.append((await session.step(one)).hidden_ND)
        assert_same(results, expected, codec)
        await session.close()


async def test_a_hop_that_is_lost_during_a_replay_is_replaced_as_well(hosts, until):
    script = SCRIPTS["tokens"]
    expected = await undisturbed(hosts, script)
    async with (
        hosts.chain(*SPANS) as chain,
        hosts.swarm() as swarm,
        spares_for(hosts, until, swarm, ["0:2", "0:4", "2:4"]) as spares,
    ):
        session = make_session(swarm)
        await session.open()
        results = [(await session.step(one)).hidden_ND for one in script[:2]]
        for host in chain:
            hosts.network.cut(host.peer)
        for spare in (spares[0], spares[2]):
            hosts.network.drop_after(spare.peer, 600)  # it opens, and breaks in what it answers to the replay
        results += [(await session.step(one)).hidden_ND for one in script[2:]]
        assert_same(results, expected)
        assert {hop.peer for hop in session.chain.hops} <= {spare.peer for spare in spares}
        await session.close()


async def test_when_nobody_is_left_the_step_fails_and_the_session_goes_on_later(hosts, until):
    script = SCRIPTS["beams"]
    expected = await undisturbed(hosts, script)
    async with hosts.chain(*SPANS) as chain, hosts.swarm() as swarm:
        session = make_session(swarm, rows=3)
        await session.open()
        results = [(await session.step(one)).hidden_ND for one in script[:3]]
        hosts.network.cut(chain[2].peer)
        for _ in range(2):  # its reordering has been taken by two hops, and is undone
            with pytest.raises(NoChain, match=f"blocks 3:4 .*tried before: {chain[2].peer[:8]}: peer "):
                await session.step(script[3])
            swarm._bans.forgive(chain[2].peer)
        async with spares_for(hosts, until, swarm, ["2:4"]):
            results += [(await session.step(one)).hidden_ND for one in script[3:]]
            assert_same(results, expected)
            await session.close()


@pytest.mark.parametrize("crashes", [False, True], ids=["its lease has ended", "it has crashed and is back"])
@pytest.mark.parametrize("lost", range(3))
async def test_a_hop_that_has_forgotten_the_session_is_given_it_again(hosts, lost, crashes):
    """There is no other server of its blocks."""
    expected = await undisturbed(hosts, SCRIPTS["rewinds"])
    async with hosts.chain(*SPANS) as chain, hosts.swarm() as swarm:
        session = make_session(swarm)
        await session.open()
        results = []
        for one in SCRIPTS["rewinds"]:
            results.append((await session.step(one)).hidden_ND)
            if crashes:
                await chain[lost].handler.drop_sessions()
            else:
                chain[lost].handler.expire_sessions()
        assert_same(results, expected)
        assert {replay.hop.peer for replay in session.replays} == {chain[lost].peer}
        assert not swarm._bans.banned(0.0)
        await session.close()


async def test_a_hop_that_is_busy_at_the_wrong_time_is_left_and_not_blamed(hosts, until):
    async with (
        hosts.chain(*SPANS) as chain,
        hosts.swarm() as swarm,
        spares_for(hosts, until, swarm, ["1:3"]) as (spare,),
    ):
        session = make_session(swarm)
        await session.open()
        await session.step(step((0,), (5,)))
        chain[1].engine._worker.put = full
        await session.step(step((5,), (1,)))
        assert session.chain.hops[1].peer == spare.peer
        assert not swarm._bans.banned(0.0)
        await session.close()


def full(work):
    raise PeerBusy("99 requests are waiting already")


# Any interleaving


@st.composite
def stories(draw):
    """Steps of three rows, and who is cut off during each: the hop's number, and after how many turns of the loop."""
    lengths, story = [0, 0, 0], []
    for seed in range(draw(st.integers(2, 7))):
        order = draw(st.none() | st.tuples(*[st.integers(0, 2)] * 3)) if seed else None
        kept = [lengths[row] for row in order] if order else lengths
        starts = [draw(st.just(length) | st.integers(0, length)) for length in kept]
        counts = [draw(st.integers(0, 4)) for _ in starts]
        counts[0] += not sum(counts)
        lengths = [start + count for start, count in zip(starts, counts, strict=True)]
        cuts = draw(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 60)), max_size=2)) if seed else []
        story.append((step(starts, counts, seed, order), cuts))
    apart = draw(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=6))
    return story, apart


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(story=stories())
def test_any_interleaving_of_steps_rewinds_reorderings_and_deaths_gives_the_same(hosts, story):
    anyio.run(play, type(hosts)(), *story)


async def play(hosts, story, apart):
    expected = await undisturbed(hosts, [one for one, _ in story])
    async with hosts.chain(*SPANS, *SPANS) as servers, hosts.swarm(attempts=12, chain_s=5.0, step_s=20.0) as swarm:
        for one, other in apart:  # these cannot reach each other, so what they send goes by way of the client
            hosts.network.separate(servers[one].peer, servers[other].peer)
        session = make_session(swarm, rows=3)
        await session.open()
        results = []
        for one, cuts in story:
            hops = session.chain.hops
            async with anyio.create_task_group() as tasks:
                for number, turns in cuts:
                    tasks.start_soon(cut_after, hosts.network, hops[number % len(hops)].peer, turns)
                results.append((await session.step(one)).hidden_ND)
                tasks.cancel_scope.cancel()
            for hop in hops:  # whoever was cut off comes back, and has forgotten all
                hosts.network.mend(hop.peer)
        assert_same(results, expected)
        await session.close()


async def cut_after(network, peer, turns):
    for _ in range(turns):
        await anyio.lowlevel.checkpoint()
    network.cut(peer)


async def test_a_row_taken_back_beyond_what_windows_keep_is_replayed(hosts):
    """The tiny model's windows see six tokens; a server keeps those before them for a while."""
    script = [step((0,), (240,)), step((240,), (240,), 1), step((480,), (1,), 2), step((40,), (3,), 3)]
    results, replays = [], []
    for spans in (("0:4",), ("0:2", "2:4")):
        async with hosts.chain(*spans, family="mistral", context_tokens=512) as chain, hosts.swarm() as swarm:
            session = make_session(swarm)
            await session.open()
            results.append([(await session.step(one)).hidden_ND for one in script])
            replays.append(sum(replay.tokens for replay in session.replays))
            await session.close()
        async with hosts.host(family="mistral"), hosts.swarm() as swarm:
            session = make_session(swarm)
            await session.open()
            whole = StepTokens(torch.cat((script[0].hidden_ND[:40], script[3].hidden_ND)), (0,), (43,))
            expected_ND = (await session.step(whole)).hidden_ND[40:]
            await session.close()
        assert torch.allclose(results[-1][-1], expected_ND, rtol=1e-4, atol=1e-4)
        assert len(chain) == len(spans)
    assert min(replays) >= 40

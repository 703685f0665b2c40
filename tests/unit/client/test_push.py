"""Outputs go from server to server, and by way of the client only where they must; either way they are the same."""

# N packed tokens, D model width

import time

import anyio
import pytest
import torch

from corolla.client import Session, StepTokens, Target
from corolla.errors import PeerTimeout
from corolla.terms import ModelId, Span

pytestmark = pytest.mark.anyio

WIDTH = 64
SPANS = ("0:1", "1:3", "3:4")
DELAY_S = 0.05


def step(count, start=0, seed=0):
    hidden_ND = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))
    return StepTokens(hidden_ND, (start,), (count,))


async def open_session(swarm, **options):
    session = Session(swarm, Target(ModelId("ab" * 32), Span(0, 4), "raw"), rows=1, max_tokens=64)
    await session.open()
    return session


def spy_on(network):
    """Count the bytes between peers, by who sent them to whom."""
    counted, note = {}, network._note_sent

    def count(stream, nbytes):
        pair = stream.owner, stream.peer
        counted[pair] = counted.get(pair, 0) + nbytes
        note(stream, nbytes)

    network._note_sent = count
    return counted


@pytest.mark.parametrize(("push", "ways"), [(True, len(SPANS) + 1), (False, 2 * len(SPANS))])
async def test_a_step_takes_one_way_to_each_hop_and_one_back(hosts, push, ways):
    async with hosts.chain(*SPANS), hosts.swarm(push=push) as swarm:
        session = await open_session(swarm)
        await session.step(step(3))
        hosts.network.delay_s = DELAY_S
        elapsed_s = []
        for start in range(3, 6):
            began_s = time.perf_counter()
            await session.step(step(1, start))
            elapsed_s.append(time.perf_counter() - began_s)
        assert ways * DELAY_S <= min(elapsed_s) < (ways + 0.9) * DELAY_S
        hosts.network.delay_s = 0.0
        await session.close()


async def test_hidden_states_pass_between_servers_and_not_through_the_client(hosts):
    counted = spy_on(hosts.network)
    async with hosts.chain(*SPANS) as chain, hosts.swarm() as swarm:
        client = swarm._endpoint.peer_id
        session = await open_session(swarm)
        result = await session.step(step(200), taps=(1,))
        first, middle, last = (host.peer for host in chain)
        nbytes = 200 * WIDTH * 4
        assert counted[first, middle] > nbytes
        assert counted[middle, last] > nbytes
        assert counted[client, first] > nbytes
        assert counted[last, client] > nbytes
        assert counted[middle, client] > nbytes  # the tap
        assert counted[first, client] < nbytes / 4
        assert counted.get((client, middle), 0) < nbytes / 4
        assert set(result.taps) == {1}
        await session.close()


@pytest.mark.parametrize("apart", [(0, 1), (1, 2)])
async def test_a_pair_that_cannot_meet_is_served_by_way_of_the_client(hosts, apart):
    """Petals defect C: pushing was asked for in the wrong case, and so never."""
    async with hosts.chain(*SPANS) as chain, hosts.swarm() as swarm:
        session = await open_session(swarm)
        expected = [(await session.step(one)).hidden_ND for one in (step(5), step(1, 5, 1))]
        await session.close()
        counted = spy_on(hosts.network)
        hosts.network.separate(*(chain[index].peer for index in apart))
        session = await open_session(swarm)
        for one, expected_ND in zip((step(5), step(1, 5, 1)), expected, strict=True):
            assert torch.equal((await session.step(one)).hidden_ND, expected_ND)
        assert not swarm._bans.banned(0.0)
        client, nbytes = swarm._endpoint.peer_id, 6 * WIDTH * 4
        assert counted[client, chain[apart[1]].peer] > nbytes
        one, other = (0, 1) if apart == (1, 2) else (1, 2)
        assert counted[chain[one].peer, chain[other].peer] > nbytes
        await session.close()


async def test_a_prompt_passes_in_pieces_that_several_hops_work_on_at_once(hosts):
    async with hosts.chain(*SPANS), hosts.swarm(piece_tokens=16) as swarm:
        session = await open_session(swarm)
        whole = await session.step(step(250), taps=(0, 3))
        assert whole.hidden_ND.shape == whole.taps[0].shape == (250, WIDTH)
        assert torch.equal(whole.taps[3], whole.hidden_ND)
        fresh = await open_session(swarm)
        swarm.config = type(swarm.config)(codec="raw")
        assert torch.allclose((await fresh.step(step(250))).hidden_ND, whole.hidden_ND, rtol=1e-4, atol=1e-5)
        again = await session.step(step(1, 250, 1))
        assert torch.allclose(again.hidden_ND, (await fresh.step(step(1, 250, 1))).hidden_ND, rtol=1e-4, atol=1e-5)
        await session.close()
        await fresh.close()


async def test_a_server_that_answers_no_pings_is_not_waited_for(hosts):
    async with hosts.chain(*SPANS) as chain, hosts.swarm(step_s=60.0) as swarm, hosts.host("1:3"):
        session = await open_session(swarm)
        await session.step(step(5))
        slow = session.chain.hops[1].peer
        for host in hosts.all:
            if host.peer == slow:
                host.engine.step = lambda *_, **__: anyio.sleep_forever()
        with anyio.fail_after(10):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(session.step, step(1, 5, 1))
                await anyio.sleep(0.1)
                swarm.blame(slow, PeerTimeout("no pong", peer=slow))  # as a failed ping does
        assert slow not in {hop.peer for hop in session.chain.hops}
        assert chain[0].peer == session.chain.hops[0].peer
        await session.close()


async def test_a_server_that_wakes_up_after_it_was_replaced_disturbs_nobody(hosts, until):
    """It was only slow: what it then sends comes too late, and is dropped."""
    async with hosts.chain(*SPANS) as chain, hosts.swarm(step_s=0.3) as swarm, hosts.host("1:3") as spare:
        session = await open_session(swarm)
        await session.step(step(5))
        slow = next(host for host in (chain[1], spare) if host.peer == session.chain.hops[1].peer)
        release, put = anyio.Event(), slow.engine.step

        async def step_late(*args, **kwargs):
            result = await put(*args, **kwargs)
            await release.wait()
            return result

        slow.engine.step = step_late
        second = await session.step(step(1, 5, 1))
        assert session.chain.hops[1].peer != slow.peer
        assert [replay.tokens for replay in session.replays] == [5]
        release.set()
        third = await session.step(step(1, 6, 2))
        await until(lambda: slow.engine.load.sessions == 0)
        await session.close()
        slow.engine.step = put
        fresh = await open_session(swarm)
        await fresh.step(step(5))
        assert torch.allclose(second.hidden_ND, (await fresh.step(step(1, 5, 1))).hidden_ND, rtol=1e-4, atol=1e-5)
        assert torch.allclose(third.hidden_ND, (await fresh.step(step(1, 6, 2))).hidden_ND, rtol=1e-4, atol=1e-5)
        await fresh.close()

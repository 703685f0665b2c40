"""A client whose connection was lost comes back to its session: nothing is computed again, no answer counts twice."""

# N packed tokens, D model width

import anyio
import anyio.lowlevel
import pytest
import torch

from corolla.client import Session, StepTokens, Target
from corolla.errors import PeerLost, SessionExpired
from corolla.terms import ModelId, Span
from corolla.wire import Done, OpenSession, Output, Resume, SessionOpened, Step

pytestmark = pytest.mark.anyio

WIDTH = 64
SPANS = ("0:1", "1:3", "3:4")
STEPS = [(0, 40), (40, 1), (41, 3), (20, 2), (22, 1)]


def step(start, count):
    hidden_ND = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(start + count))
    return StepTokens(hidden_ND, (start,), (count,))


async def open_session(swarm):
    session = Session(swarm, Target(ModelId("ab" * 32), Span(0, 4), "raw"), rows=1, max_tokens=64)
    await session.open()
    return session


async def undisturbed(hosts):
    async with hosts.chain(*SPANS), hosts.swarm(piece_tokens=16) as swarm:
        session = await open_session(swarm)
        results = [(await session.step(step(*one))).hidden_ND for one in STEPS]
        await session.close()
        return results


async def cut_off(network, peer, turns, away_s):
    """Lose a peer's connection after some turns of the loop, for a while."""
    for _ in range(turns):
        await anyio.lowlevel.checkpoint()
    network.cut(peer)
    await anyio.sleep(away_s)
    network.mend(peer)


@pytest.mark.parametrize("away_s", [0.0, 0.5])
@pytest.mark.parametrize("turns", [0, 5, 20, 60, 150])
async def test_a_client_that_was_cut_off_at_any_time_goes_on_with_what_the_servers_hold(hosts, until, turns, away_s):
    expected = await undisturbed(hosts)
    async with hosts.chain(*SPANS, resume_s=20.0) as chain, hosts.swarm(piece_tokens=16, resume_s=20.0) as swarm:
        session = await open_session(swarm)
        results = [(await session.step(step(0, 40))).hidden_ND]
        for one in STEPS[1:4]:
            away_s = 0.0 if len(results) > 2 else away_s
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(cut_off, hosts.network, swarm._endpoint.peer_id, turns, away_s)
                results.append((await session.step(step(*one))).hidden_ND)
        results.append((await session.step(step(*STEPS[4]))).hidden_ND)
        assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))
        assert not session.replays
        assert [hop.peer for hop in session.chain.hops] == [host.peer for host in chain]
        assert not swarm._bans.banned(0.0)
        assert [host.engine.load.sessions for host in chain] == [1, 1, 1]
        await session.close()
        await until(lambda: not any(host.engine.load.sessions for host in chain))


@pytest.mark.parametrize("lost", range(3))
async def test_a_server_that_was_cut_off_for_a_moment_keeps_its_place(hosts, lost):
    """Steps that were on their way to it come again."""
    expected = await undisturbed(hosts)
    async with hosts.chain(*SPANS, resume_s=20.0) as chain, hosts.swarm(piece_tokens=16) as swarm:
        session = await open_session(swarm)
        results = [(await session.step(step(0, 40))).hidden_ND]
        for turns, one in zip((0, 10, 25, 45), STEPS[1:], strict=True):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(cut_off, hosts.network, chain[lost].peer, turns, 0.0)
                results.append((await session.step(step(*one))).hidden_ND)
        assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))
        assert not session.replays
        await session.close()


async def test_a_client_that_comes_back_too_late_is_given_a_replay(hosts, until):
    expected = await undisturbed(hosts)
    async with hosts.chain(*SPANS, resume_s=0.05) as chain, hosts.swarm(chain_s=5.0) as swarm:
        session = await open_session(swarm)
        results = [(await session.step(step(*one))).hidden_ND for one in STEPS[:2]]
        hosts.network.cut(swarm._endpoint.peer_id)
        await until(lambda: not any(host.engine.load.sessions for host in chain))
        hosts.network.mend(swarm._endpoint.peer_id)
        results += [(await session.step(step(*one))).hidden_ND for one in STEPS[2:]]
        for result_ND, expected_ND in zip(results, expected, strict=True):
            assert torch.allclose(result_ND, expected_ND, rtol=1e-4, atol=1e-5)
        assert len(session.replays) == 3
        await session.close()


async def test_what_is_said_twice_or_too_late_changes_nothing(hosts):
    expected = await undisturbed(hosts)
    async with hosts.chain(*SPANS), hosts.swarm(piece_tokens=16) as swarm:
        session = await open_session(swarm)
        hear, said = session._hops.hops.hear, []

        async def hear_all_again(hop, heard):
            said.append((hop, heard))
            for again in [*said[-6:], said[-1]]:
                await hear(*again)

        session._hops.hops.hear = hear_all_again
        results = [(await session.step(step(*one))).hidden_ND for one in STEPS]
        assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))
        await session.close()


def opening(key=b"k" * 16, **changes):
    fields = {"model": "ab" * 32, "span": Span(0, 4), "rows": 1, "max_tokens": 32, "codec": "raw", "key": key}
    return OpenSession(**fields | changes)


def message(number, start):
    from corolla.codec import encode

    encoded = encode(step(start, 3).hidden_ND, "raw")
    return Step(starts=(start,), counts=(3,), hidden=encoded.meta, number=number), encoded.buffers


async def test_answers_that_were_missed_are_told_again_and_the_others_are_not(hosts):
    async with (
        hosts.host(resume_s=10.0) as host,
        hosts.endpoint() as endpoint,
        endpoint.channel(host.peer, host.endpoint.addresses) as channel,
    ):
        await channel.request(opening(), expected=SessionOpened, deadline_s=5)
        for number in (1, 2, 3):
            await channel.request(*message(number, 3 * number - 3), expected=Output, deadline_s=5)
        async with endpoint.channel(host.peer, host.endpoint.addresses, is_new=True) as other:
            opened = await other.request(Resume(key=b"k" * 16, done=1), expected=SessionOpened, deadline_s=5)
            assert opened.message.taken == 3
            assert [(await other.receive(deadline_s=5)).message.number for _ in range(2)] == [2, 3]
            with pytest.raises(PeerLost):  # the old stream is not the session's any more
                await channel.request(*message(4, 9), expected=Output, deadline_s=5)
            await other.send(*message(3, 6))
            await other.request(*message(4, 9), expected=Output, deadline_s=5)
            await other.aclose()


async def test_nobody_else_can_come_back_to_a_session(hosts):
    async with hosts.host(resume_s=10.0) as host, hosts.channel(host) as channel, hosts.channel(host) as stranger:
        await channel.request(opening(), expected=SessionOpened, deadline_s=5)
        for key in (b"k" * 16, b"x" * 16):
            with pytest.raises(SessionExpired, match="the session is over; open another one"):
                await stranger.request(Resume(key=key, done=0), expected=SessionOpened, deadline_s=5)
        await channel.request(*message(1, 0), expected=Output, deadline_s=5)
        await channel.aclose()


async def test_a_session_whose_client_is_away_gives_its_room_to_whoever_asks(hosts, until):
    async with (
        hosts.host(resume_s=60.0, pages=2) as host,
        hosts.endpoint() as endpoint,
        endpoint.channel(host.peer, host.endpoint.addresses) as channel,
    ):
        await channel.request(opening(max_tokens=128), expected=SessionOpened, deadline_s=5)
        hosts.network.cut(endpoint.peer_id)
        await until(lambda: all(one.line.is_parked for one in host.handler._sessions))
        async with hosts.channel(host) as other:
            await other.request(opening(max_tokens=128), expected=SessionOpened, deadline_s=5)
            assert host.engine.load.sessions == 1
            host.engine.check_integrity()
            await other.aclose()
        await channel.aclose()


async def test_done_tells_what_room_is_left(hosts):
    async with hosts.host("0:4") as host, hosts.channel(host) as channel:
        await channel.request(opening(), expected=SessionOpened, deadline_s=5)
        replayed, payload = message(0, 0)
        done = await channel.request(replayed, payload, expected=Done, deadline_s=5)
        load = host.engine.load
        assert (done.message.load.free_tokens, done.message.load.sessions) == (load.free_tokens, load.sessions)
        output = await channel.request(*message(1, 3), expected=Output, deadline_s=5)
        assert output.message.load == done.message.load
        await channel.aclose()


async def test_a_client_knows_at_once_when_a_server_has_filled_up(hosts):
    """What a server has announced may be seconds old; what it says with each step is not."""
    async with hosts.host("0:4", pages=3) as first, hosts.swarm() as swarm:
        session = Session(swarm, Target(ModelId("ab" * 32), Span(0, 4), "raw"), rows=1, max_tokens=64)
        await session.open()
        async with hosts.channel(first) as other:
            await other.request(opening(max_tokens=128), expected=SessionOpened, deadline_s=5)
            await session.step(step(0, 3))
            live = swarm._experience.freshen(swarm.snapshot(), anyio.current_time())
            assert [(one.free_tokens, one.sessions) for one in live.announcements] == [(0, 2)]
            await other.aclose()
        await session.close()

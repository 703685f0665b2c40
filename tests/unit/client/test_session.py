"""A session over several hops holds on every hop what its client believes, or it is over; and then nothing is left."""

# N packed tokens, D model width

from functools import partial

import anyio
import anyio.lowlevel
import pytest
import torch

from corolla.client import Session, StepTokens, Target
from corolla.errors import (
    CacheFull,
    CodecError,
    ContextTooLong,
    NoChain,
    PeerBusy,
    PeerUnreachable,
    SessionClosed,
)
from corolla.terms import ModelId, Span, Speed

pytestmark = pytest.mark.anyio

WIDTH = 64
SPANS = ("0:1", "1:3", "3:4")


def target(codec="raw"):
    return Target(ModelId("ab" * 32), Span(0, 4), codec)


def tokens(count=3, start=0, seed=0, rows=1, order=None):
    hidden_ND = torch.randn(rows * count, WIDTH, generator=torch.Generator().manual_seed(seed))
    return StepTokens(hidden_ND, (start,) * rows, (count,) * rows, order)


def two_rows(seed):
    """Tokens for two rows that differ."""
    return StepTokens(torch.cat([tokens(seed=seed).hidden_ND, tokens(seed=seed + 100).hidden_ND]), (0, 0), (3, 3))


def assert_close(result, expected):
    """A replay computes in other batches, so sums may be rounded otherwise."""
    assert torch.allclose(result.hidden_ND, expected.hidden_ND, rtol=1e-4, atol=1e-5)


def make_session(swarm, *, rows=1, max_tokens=64, **options):
    return Session(swarm, target(**options), rows=rows, max_tokens=max_tokens)


async def no_sessions(until, chain):
    await until(lambda: all(host.engine.load.sessions == 0 for host in chain))
    for host in chain:
        host.engine.check_integrity()


# Steps


@pytest.mark.parametrize(
    ("counts", "limit", "expected"),
    [
        ((5,), 2, [((0,), (2,)), ((2,), (2,)), ((4,), (1,))]),
        ((2, 3), 4, [((0, 0), (2, 2)), ((2, 2), (0, 1))]),
        ((1, 0, 1), 8, [((0, 0, 0), (1, 0, 1))]),
        ((2, 2), 1, [((0, 0), (1, 0)), ((1, 0), (1, 0)), ((2, 0), (0, 1)), ((2, 1), (0, 1))]),
    ],
)
def test_pieces_of_a_step_add_up_to_it(counts, limit, expected):
    step = StepTokens(torch.arange(sum(counts))[:, None], (0,) * len(counts), counts, tuple(range(len(counts))))
    pieces = list(step.pieces(limit))
    assert [(piece.starts, piece.counts) for piece in pieces] == expected
    assert torch.equal(torch.cat([piece.hidden_ND for piece in pieces]), step.hidden_ND)
    assert [piece.order for piece in pieces] == [step.order] + [None] * (len(pieces) - 1)


async def test_a_session_says_where_its_time_goes_and_leaves_nothing(hosts, until):
    async with hosts.chain(*SPANS) as chain, hosts.swarm() as swarm:
        session = make_session(swarm)
        await session.open()
        assert [str(hop.span) for hop in session.chain.hops] == list(SPANS)
        result = await session.step(tokens(), taps=(0, 2))
        assert result.hidden_ND.shape == (3, WIDTH)
        assert set(result.taps) == {0, 2}
        assert [str(timing.hop.span) for timing in session.timings] == list(SPANS)
        assert all(timing.total_s >= timing.compute_s > 0 for timing in session.timings)
        await session.close()
        await session.close()
        await no_sessions(until, chain)


async def test_channels_of_a_closed_session_serve_the_next(hosts, until):
    async with hosts.chain(*SPANS) as chain, hosts.swarm() as swarm:
        await until(lambda: all(swarm._pings.rtt_s(host.peer) is not None for host in chain))
        peers = set()
        for _ in range(5):
            session = make_session(swarm)
            await session.open()
            await session.step(tokens())
            await session.close()
            mine = {stream for stream in hosts.network._streams if stream.owner == swarm._endpoint.peer_id}
            peers.add(frozenset(mine))
        assert len(peers) == 1
        assert len(mine) <= 2 * len(chain) + 1  # one for the session, one to measure the way, one to follow the swarm


async def test_a_step_before_opening_or_after_closing_is_refused(hosts):
    async with hosts.host(), hosts.swarm() as swarm:
        session = make_session(swarm)
        with pytest.raises(SessionClosed, match="never opened"):
            await session.step(tokens())
        await session.open()
        await session.close()
        with pytest.raises(SessionClosed, match="it was closed; open another"):
            await session.step(tokens())


async def test_an_unknown_codec_is_refused_at_once(hosts):
    async with hosts.host(), hosts.swarm() as swarm:
        with pytest.raises(CodecError, match="no codec 'gzip'"):
            make_session(swarm, codec="gzip")


@pytest.mark.parametrize("order", [None, (1, 0), (1, 1)])
async def test_a_step_that_a_later_hop_refuses_leaves_no_trace(hosts, until, order):
    # The middle server has room for two rows of a page; so many have the others, and more.
    async with hosts.chain("0:1"), hosts.host("1:3", pages=3) as small, hosts.host("3:4"), hosts.swarm() as swarm:
        session, fresh = make_session(swarm, rows=2), make_session(swarm, rows=2)
        await session.open()
        await session.step(two_rows(seed=1))
        with pytest.raises(NoChain, match="blocks 1:3 .*more than are free"):
            await session.step(tokens(200, start=3, rows=2, order=order))
        again = await session.step(tokens(2, start=3, rows=2, seed=2, order=(1, 0)))
        assert {replay.tokens for replay in session.replays} == {6}
        await session.close()
        await fresh.open()
        await fresh.step(two_rows(seed=1))
        assert_close(again, await fresh.step(tokens(2, start=3, rows=2, seed=2, order=(1, 0))))
        await fresh.close()
        await no_sessions(until, [small])


async def test_a_prompt_beyond_the_context_is_refused_and_the_session_goes_on(hosts):
    async with hosts.chain(*SPANS), hosts.swarm() as swarm:
        session = make_session(swarm)
        await session.open()
        with pytest.raises(ContextTooLong, match="300 tokens.*256"):
            await session.step(tokens(300))
        await session.step(tokens())
        await session.close()


async def test_a_session_that_a_server_gave_up_is_opened_again(hosts, until):
    async with hosts.host("0:2"), hosts.host("2:4", lease_s=0.05) as second, hosts.swarm() as swarm:
        session = make_session(swarm)
        await session.open()
        await session.step(tokens())
        await until(lambda: second.engine.load.sessions == 0)
        await session.step(tokens(1, start=3))
        assert [replay.tokens for replay in session.replays] == [3]
        assert not swarm._bans.banned(0.0)  # being forgetful is no crime
        await session.close()


# Opening


async def test_missing_blocks_are_named(hosts):
    async with hosts.chain("0:1", "3:4"), hosts.swarm() as swarm:
        with pytest.raises(NoChain, match=r"blocks 1:3 .*2 servers of the model are known, the view is \d"):
            await make_session(swarm).open()


async def test_blocks_that_come_late_are_waited_for(hosts, until):
    async with hosts.host("0:2"), hosts.swarm(chain_s=5.0) as swarm, anyio.create_task_group() as tasks:
        session = make_session(swarm)
        tasks.start_soon(session.open)
        async with hosts.host("2:4"):
            await until(lambda: session.chain is not None and len(session.chain.hops) == 2)
            await session.close()


@pytest.mark.parametrize("broken", range(3))
async def test_a_hop_that_cannot_be_reached_is_replaced_in_the_same_call(hosts, until, broken):
    """Petals defect A: a failed peer was chosen again, because its spans were not taken out of the plan."""
    async with hosts.chain(*SPANS) as chain, hosts.host("0:4") as spare, hosts.swarm() as swarm:
        await spare.announce(speed=Speed(decode_tokens_per_s=0.01, prefill_tokens_per_s=1))  # the last choice
        await until(lambda: any(found.speed for found in swarm.snapshot().announcements))
        hosts.network.cut(chain[broken].peer)
        session = make_session(swarm)
        await session.open()
        assert chain[broken].peer not in {hop.peer for hop in session.chain.hops}
        assert chain[broken].peer in swarm._bans.banned(0.0)
        await session.step(tokens())
        await session.close()
        await no_sessions(until, [*chain, spare])


async def test_when_all_fail_the_error_says_who_and_why_and_nothing_is_left(hosts, until):
    async with hosts.chain(*SPANS) as chain, hosts.swarm() as swarm:
        hosts.network.cut(chain[1].peer)
        with pytest.raises(
            NoChain, match=f"blocks 1:3.*tried before: {chain[1].peer[:8]}: peer .* could not be reached"
        ):
            await make_session(swarm).open()
        await no_sessions(until, chain)


async def test_a_server_without_room_is_not_asked_and_named_when_it_is_the_only_one(hosts):
    async with hosts.host("0:4", pages=9) as host, hosts.swarm() as swarm:
        free_tokens = host.engine.load.free_tokens
        with pytest.raises(NoChain, match=rf"blocks 0:4 .*with {64 * 200} free KV tokens"):
            await make_session(swarm, rows=64, max_tokens=200).open()
        await host.announce(free_tokens=10**6)  # it is wrong about itself
        with pytest.raises((PeerBusy, NoChain, CacheFull), match="need 256 KV pages"):
            await make_session(swarm, rows=64, max_tokens=200).open()
        assert host.engine.load.free_tokens == free_tokens
        assert not swarm._bans.banned(0.0)  # being busy is no crime


async def test_only_allowed_peers_are_used_and_avoided_ones_never(hosts):
    async with hosts.chain(*SPANS) as chain, hosts.host("0:4") as whole:
        async with hosts.swarm(allow_peers=tuple(host.peer for host in chain)) as swarm:
            session = make_session(swarm)
            await session.open()
            assert [hop.peer for hop in session.chain.hops] == [host.peer for host in chain]
            await session.close()
        async with hosts.swarm(avoid_peers=(chain[0].peer,)) as swarm:
            session = make_session(swarm)
            await session.open()
            assert session.chain.hops[0].peer == whole.peer
            await session.close()
        async with hosts.swarm(avoid_peers=(chain[0].peer, whole.peer)) as swarm:
            with pytest.raises(NoChain, match="no server for blocks 0:1 .*2 peers avoided"):
                await make_session(swarm).open()


# Cancelling


@pytest.mark.parametrize("what", ["open", "step", "close"])
async def test_cancelled_at_any_time_nothing_is_left_on_any_hop(hosts, until, what):
    async with hosts.chain(*SPANS) as chain, hosts.swarm() as swarm:
        passes, is_done = 0, False
        while not is_done:
            session = make_session(swarm)
            if what != "open":
                await session.open()
            call = {"open": session.open, "close": session.close, "step": partial(session.step, tokens())}[what]
            is_done = await is_done_after(passes, call)
            if what == "step" and not is_done:
                with pytest.raises(SessionClosed, match="interrupted"):
                    await session.step(tokens())
            await session.close()
            await no_sessions(until, chain)
            passes += 1 + passes // 16  # at first every one, and later fewer, because computing takes many
        assert passes > 5
        session = make_session(swarm)
        await session.open()
        await session.step(tokens())
        await session.close()


async def is_done_after(passes, call):
    """Run something until the event loop has gone round so many times, and say whether it was done by then."""
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as tasks:

            async def cancel():
                for _ in range(passes):
                    await anyio.lowlevel.checkpoint()
                scope.cancel()

            tasks.start_soon(cancel)
            await call()
            tasks.cancel_scope.cancel()
    return not scope.cancelled_caught


async def test_a_session_that_is_closed_during_a_step_says_so(hosts, until):
    async with hosts.chain(*SPANS) as chain, hosts.swarm() as swarm:
        session = make_session(swarm)
        await session.open()
        hosts.network.delay_s = 0.05
        async with anyio.create_task_group() as tasks:

            async def step():
                with pytest.raises(SessionClosed, match="it was closed"):
                    await session.step(tokens())

            tasks.start_soon(step)
            await anyio.sleep(0.02)
            await session.close()
        await no_sessions(until, chain)
        assert not swarm._bans.banned(0.0)


async def test_a_peer_that_is_not_there_is_unreachable(hosts):
    async with hosts.host() as host:
        hosts.network.cut(host.peer)
        with pytest.raises(PeerUnreachable):
            async with hosts.channel(host):
                pass

"""Whole sequences go through blocks and back whoever fails on the way; what no honest server sends is not believed."""

# B batch, T tokens, D model width

import anyio
import anyio.lowlevel
import pytest
import torch

from corolla.client import Session, StepTokens, Target
from corolla.client.blocks import _backward_all, _forward_all
from corolla.client.gather import gather
from corolla.client.requests import Batch, Pass, run_backward, run_forward
from corolla.codec import encode
from corolla.errors import NoChain, PeerBusy, PeerLost, PeerMisbehaved, PeerTimeout
from corolla.terms import Hop, ModelId, Span, Speed
from corolla.wire import OpenSession, Output, SessionOpened, TensorMeta, Timing

pytestmark = pytest.mark.anyio

TARGET = Target(ModelId("ab" * 32), Span(0, 4), "raw")
SPANS = ("0:1", "1:3", "3:4")


def batch(rows=2, tokens=5, taps=()):
    return Batch(torch.randn(rows, tokens, 64, generator=torch.Generator().manual_seed(0)), taps=taps)


async def reference(hosts, taps=()):
    """What one server makes of the batch, forward and back."""
    async with hosts.host("0:4"), hosts.swarm() as swarm:
        done = await run_forward(swarm, TARGET, batch(taps=taps))
        grads = await run_backward(swarm, TARGET, batch(taps=taps), done.inputs, ones(done))
        return done, grads.hidden_BTD


def ones(done):
    return Pass(torch.ones_like(done.hidden_BTD), taps={tap: torch.ones_like(one) for tap, one in done.taps.items()})


@pytest.mark.parametrize("taps", [(), (0, 2)])
async def test_several_hops_compute_what_one_does(hosts, taps):
    expected, expected_grad_BTD = await reference(hosts, taps)
    async with hosts.chain(*SPANS), hosts.swarm() as swarm:
        done = await run_forward(swarm, TARGET, batch(taps=taps))
        grad_BTD, _ = await run_backward(swarm, TARGET, batch(taps=taps), done.inputs, ones(done))
    assert [str(hop.span) for hop, _ in done.inputs] == list(SPANS)
    assert torch.equal(done.hidden_BTD, expected.hidden_BTD)
    assert all(torch.equal(done.taps[tap], expected.taps[tap]) for tap in taps)
    # Where a tap is, gradients from three places are added, in another order.
    assert torch.allclose(grad_BTD, expected_grad_BTD, rtol=1e-5, atol=1e-5)
    assert torch.equal(grad_BTD, expected_grad_BTD) or taps


@pytest.mark.parametrize("broken", range(3))
@pytest.mark.parametrize("way", ["forward", "backward"])
async def test_a_hop_that_is_lost_is_replaced_from_its_input_on(hosts, until, broken, way):
    expected, expected_grad_BTD = await reference(hosts)
    async with hosts.chain(*SPANS) as chain, hosts.host("0:4") as spare, hosts.swarm() as swarm:
        await spare.announce(speed=Speed(decode_tokens_per_s=0.01, prefill_tokens_per_s=1))  # the last choice
        await until(lambda: any(found.speed for found in swarm.snapshot().announcements))
        if way == "forward":
            hosts.network.cut(chain[broken].peer)
        done = await run_forward(swarm, TARGET, batch())
        assert torch.equal(done.hidden_BTD, expected.hidden_BTD)
        if way == "backward":
            hosts.network.cut(chain[broken].peer)
        grad_BTD, _ = await run_backward(swarm, TARGET, batch(), done.inputs, ones(done))
        assert torch.equal(grad_BTD, expected_grad_BTD)
        assert chain[broken].peer in swarm._bans.banned(0.0)


@pytest.mark.parametrize("way", ["forward", "backward"])
async def test_whoever_is_lost_at_any_moment_the_gradients_are_equal(hosts, until, way):
    """Two servers of each span, and one that has all: of the chain in use each is lost in turn, sooner and later."""
    expected, expected_grad_BTD = await reference(hosts)
    async with hosts.chain(*SPANS, *SPANS), hosts.swarm(attempts=12) as swarm:
        await until(lambda: len(swarm.snapshot().announcements) == 2 * len(SPANS))
        for turns in (0, 3, 6, 9, 12, 16, 20, 25, 30, 40, 50, 60):
            done = await run_forward(swarm, TARGET, batch())
            victims = [hop.peer for hop, _ in done.inputs]
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(cut_after, hosts.network, victims[turns % len(victims)], turns)
                if way == "forward":
                    done = await run_forward(swarm, TARGET, batch())
                grad_BTD, _ = await run_backward(swarm, TARGET, batch(), done.inputs, ones(done))
            assert torch.equal(done.hidden_BTD, expected.hidden_BTD)
            assert torch.equal(grad_BTD, expected_grad_BTD)
            for peer in victims:
                hosts.network.mend(peer)
                swarm.praise(peer)


async def cut_after(network, peer, turns):
    for _ in range(turns):
        await anyio.lowlevel.checkpoint()
    network.cut(peer)


async def test_gradients_go_back_through_the_parts_of_a_run_that_no_server_has_any_more(hosts):
    _, expected_grad_BTD = await reference(hosts, (1,))
    async with hosts.chain("0:2", "2:4", "1:2"), hosts.swarm() as swarm:
        async with hosts.host("0:4") as whole:
            done = await run_forward(swarm, TARGET, batch(taps=(1,)))
        hosts.network.cut(whole.peer)
        inputs = [(Hop(peer=whole.peer, span=Span(0, 4), addresses=()), batch().hidden_BTD)]
        grad_BTD, _ = await run_backward(swarm, TARGET, batch(taps=(1,)), inputs, ones(done))
        assert torch.allclose(grad_BTD, expected_grad_BTD, rtol=1e-5, atol=1e-5)


# Several chains at once


@pytest.mark.parametrize("lost", [None, "forward", "backward"])
async def test_a_batch_is_split_over_chains_by_their_speed_and_joined_in_order(hosts, until, lost):
    """What is lost on one chain is done again on another; sums over other rows round differently, and no more."""
    whole = batch(rows=9, tokens=4)
    async with hosts.host("0:4"), hosts.swarm() as swarm:
        done = await run_forward(swarm, TARGET, whole)
        expected_grad_BTD, _ = await run_backward(swarm, TARGET, whole, done.inputs, ones(done))
    async with hosts.host("0:4") as fast, hosts.host("0:4") as slow, hosts.swarm(chain_tokens=8) as swarm:
        await fast.announce(speed=Speed(decode_tokens_per_s=4, prefill_tokens_per_s=4))
        await slow.announce(speed=Speed(decode_tokens_per_s=2, prefill_tokens_per_s=2))
        await until(lambda: all(found.speed for found in swarm.snapshot().announcements))
        if lost == "forward":
            hosts.network.cut(slow.peer)
        shares, passes = await _forward_all(swarm, TARGET, whole)
        assert [len(share.part.hidden_BTD) for share in shares] == [6, 3]
        used = [{hop.peer for hop, _ in one.inputs} for one in passes]
        assert used == [{fast.peer}, {fast.peer if lost == "forward" else slow.peer}]
        if lost == "backward":
            hosts.network.cut(fast.peer)
        grads = await _backward_all(swarm, TARGET, shares, passes, [ones(done) for done in passes])
    grads_BTD = [one.hidden_BTD for one in grads]
    output_BTD = torch.cat([done.hidden_BTD for done in passes])
    assert torch.allclose(output_BTD, done.hidden_BTD, rtol=1e-5, atol=1e-5)
    assert torch.allclose(torch.cat(grads_BTD), expected_grad_BTD, rtol=1e-5, atol=1e-5)


async def test_a_batch_that_is_small_goes_to_one_chain_in_requests_of_bounded_size(hosts):
    async with hosts.chain("0:4", "0:4"), hosts.swarm(chain_tokens=100, batch_tokens=8) as swarm:
        shares, passes = await _forward_all(swarm, TARGET, batch(rows=9, tokens=4))
    assert [len(share.part.hidden_BTD) for share in shares] == [2, 2, 2, 2, 1]


async def test_every_chain_has_a_request_before_any_has_a_second(hosts):
    async with hosts.chain("0:4", "0:4"), hosts.swarm(chain_tokens=8, batch_tokens=8) as swarm:
        shares, passes = await _forward_all(swarm, TARGET, batch(rows=8, tokens=4))
    assert [share.turn for share in shares] == [0, 1, 0, 1]
    used = [{hop.peer for hop, _ in one.inputs} for one in passes]
    assert used[0] == used[1] != used[2] == used[3]


async def test_a_server_that_does_not_answer_is_given_up_in_time(hosts):
    async def be_silent(channel, message):
        pass

    async with hosts.host("0:4"), hosts.host("0:4", answer=be_silent) as silent:
        allowed = {"allow_peers": (silent.peer,), "request_s": 0.1, "open_s": 0.1, "attempts": 2}
        async with hosts.swarm(**allowed) as swarm:
            with anyio.fail_after(5), pytest.raises(NoChain, match="did not answer Forward within 0.1 s"):
                await run_forward(swarm, TARGET, batch())
            with anyio.fail_after(5), pytest.raises(NoChain, match="did not answer OpenSession within 0.1 s"):
                await Session(swarm, TARGET, rows=1, max_tokens=64).open()
        async with hosts.swarm(request_s=0.1) as swarm:
            await run_forward(swarm, TARGET, batch())  # the other one answers


def lying(*shapes, metas=None, value=0.0):
    """Answer everything with tensors of certain shapes."""

    async def answer(channel, message):
        if isinstance(message, OpenSession):
            await channel.send(SessionOpened(lease_s=60.0))
            return
        encoded = [encode(torch.full(shape, value), "raw") for shape in shapes]
        buffers = [buffer for one in encoded for buffer in one.buffers]
        described = metas or tuple(one.meta for one in encoded)
        number = getattr(message, "number", 0)
        await channel.send(Output(tensors=described, timing=Timing(0.0, 0.0), number=number), buffers)

    return answer


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lying((2, 5, 32)), r"1 tensors \(\[2, 5, 32\]\) where 1 were due \(\[2, 5, 64\]\)"),
        (lying((2, 5, 64), value=float("nan")), "640 numbers that are nan or infinite"),
        (lying((2, 5, 64), value=float("inf")), "640 numbers that are nan or infinite"),
        (lying((2, 5, 64), (2, 5, 64)), r"2 tensors .* where 1 were due"),
        (lying((2, 5, 64), metas=(TensorMeta("gzip", "float32", (2, 5, 64), 2560),)), "no codec 'gzip'"),
        (lying((2, 5, 64), metas=(TensorMeta("raw", "float32", (2, 5, 64), 99),)), "99 payload bytes"),
    ],
)
async def test_an_answer_that_does_not_fit_the_question_is_misbehaviour(hosts, until, answer, words):
    async with hosts.host("0:4", answer=answer) as liar, hosts.swarm(attempts=1) as swarm:
        with pytest.raises(PeerMisbehaved, match=words) as caught:
            await run_forward(swarm, TARGET, batch())
        assert caught.value.peer == liar.peer
        assert liar.peer in swarm._bans.banned(0.0)
        async with hosts.host("0:4") as honest:
            await until(lambda: len(swarm.snapshot().announcements) == 2)
            await run_forward(swarm, TARGET, batch())
            session = Session(swarm, TARGET, rows=1, max_tokens=64)
            await session.open()
            assert session.chain.hops[0].peer == honest.peer
            await session.close()


@pytest.mark.parametrize(
    ("answer", "words"),
    [(lying((3, 32)), r"\[3, 32\]"), (lying((3, 64), value=float("nan")), "192 numbers that are nan")],
)
async def test_a_session_goes_on_elsewhere_when_a_hop_misbehaves(hosts, until, answer, words):
    async with hosts.host("0:2") as first, hosts.host("2:4", answer=answer) as liar, hosts.swarm() as swarm:
        session = Session(swarm, TARGET, rows=1, max_tokens=64)
        await session.open()
        step = StepTokens(batch().hidden_BTD[0, :3], (0,), (3,))
        with pytest.raises(NoChain, match=rf"blocks 2:4 .*tried before: .*{words}"):
            await session.step(step)
        assert liar.peer in swarm._bans.banned(0.0)
        async with hosts.host("2:4") as honest:
            await until(lambda: len(swarm.snapshot().announcements) == 3)
            await session.step(step)
            assert [hop.peer for hop in session.chain.hops] == [first.peer, honest.peer]
            await session.close()


# Gathering


async def test_results_come_in_the_order_of_the_calls_and_so_many_run_at_once():
    running, most = 0, 0

    async def work(number):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await anyio.sleep(0.001 * (5 - number % 5))
        running -= 1
        return number

    assert await gather([(work, (number,)) for number in range(20)], at_once=3) == list(range(20))
    assert most == 3


async def test_the_first_error_is_raised_as_itself_and_cancels_the_others():
    cancelled = []

    async def fail():
        raise PeerBusy("full")

    async def wait():
        try:
            await anyio.sleep_forever()
        except BaseException:
            cancelled.append(True)
            raise

    with pytest.raises(PeerBusy, match="full"):
        await gather([(wait, ()), (wait, ()), (fail, ())])
    assert cancelled == [True, True]


async def test_nothing_gathered_is_nothing():
    assert await gather([]) == []


def test_errors_of_one_peer_are_all_tried_elsewhere():
    assert {kind.retry for kind in (PeerBusy, PeerLost, PeerTimeout, PeerMisbehaved)} == {"other"}

"""What goes wrong stays with whom it belongs to, and nothing is kept by those who have gone."""

import gc
import weakref

import anyio
import anyio.lowlevel
import pytest
import torch

from corolla.cache import PAGE_TOKENS
from corolla.engine import Engine, EngineConfig, Sequences
from corolla.engine.measure import page_cost
from corolla.errors import CacheFull, ContextTooLong, InternalError, PeerBusy, SessionClosed, UsageError
from corolla.terms import Span

pytestmark = pytest.mark.anyio

ALL = Span(0, 4)
both_paths = pytest.mark.parametrize("span", ["llama", "bloom"], indirect=True)


@pytest.fixture
def make_engine(span):
    token_bytes = page_cost(span).token_bytes

    def make(*, pages=100, **limits):
        kv_bytes = int(pages * PAGE_TOKENS * token_bytes)
        return Engine(span, EngineConfig(kv_bytes=kv_bytes, **limits), context_tokens=256)

    return make


def tokens(count, seed=0):
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(seed))


async def step(engine, session, *counts, starts=None, order=None, taps=()):
    starts = starts or (0,) * len(counts)
    result = await engine.step(session, tokens(sum(counts)), starts=starts, counts=counts, order=order, taps=taps)
    return result.tensors[0]


async def decode(engine, count=9):
    """Open a session, give it a prompt, close it."""
    session = engine.open_session(ALL, 1, count)
    try:
        return await step(engine, session, count)
    finally:
        engine.close_session(session)


def distance(actual, expected):
    return float((actual - expected).abs().max() / expected.abs().max())


def is_idle(engine):
    engine.check_integrity()
    return engine.load == (100 * PAGE_TOKENS, 0, 0)


@both_paths
async def test_a_failing_block_fails_only_the_work_of_its_tick(make_engine, gate_on, span):
    async with make_engine() as engine:
        expected = await decode(engine)
        bystander = engine.open_session(Span(1, 4), 1, 9)  # runs through other blocks, so in another tick
        failures = []

        async def fail():
            with pytest.raises(InternalError, match="blocks 0:4 failed: ZeroDivisionError") as caught:
                await decode(engine)
            failures.append(caught.value)

        with gate_on(span) as gate:
            gate.failure = ZeroDivisionError()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(fail)
                await gate.entered.wait()
                tasks.start_soon(fail)
                tasks.start_soon(step, engine, bystander, 9)
                gate.open()
        assert len(failures) == 2
        assert failures[0] is not failures[1]
        await step(engine, bystander, 1, starts=(9,))
        engine.close_session(bystander)
        assert torch.equal(await decode(engine), expected)
        assert is_idle(engine)


async def test_a_session_ends_with_its_failed_step(make_engine, gate_on, span):
    async with make_engine(tick_tokens=4) as engine:
        session = engine.open_session(ALL, 1, 20)
        await step(engine, session, 5)
        with gate_on(span) as gate:
            gate.open()
            gate.failure = ZeroDivisionError()
            with pytest.raises(InternalError):
                await step(engine, session, 9, starts=(5,))
        with pytest.raises(SessionClosed, match="failed or was given up; open another"):
            await step(engine, session, 1, starts=(5,))
        engine.close_session(session)
        assert is_idle(engine)


@both_paths
@pytest.mark.parametrize("held", [True, False], ids=["computing", "waiting"])
async def test_a_cancelled_step_frees_its_pages_and_disturbs_nobody(make_engine, gate_on, span, held):
    async with make_engine(tick_tokens=8) as engine:
        expected = await decode(engine, 30)
        with gate_on(span) as gate:
            async with anyio.create_task_group() as tasks:
                if not held:
                    tasks.start_soon(decode, engine, 1)
                    await gate.entered.wait()
                async with anyio.create_task_group() as gone:
                    gone.start_soon(decode, engine, 100)
                    gone.start_soon(decode, engine, 100)
                    await gate.entered.wait()
                    await anyio.wait_all_tasks_blocked()
                    gone.cancel_scope.cancel()
                assert engine.load.sessions == (0 if held else 1)
                gate.open()
            assert distance(await decode(engine, 30), expected) < 1e-5
        assert gate.passed <= 1 + 8 + 30  # of what was cancelled, at most the tick that was being computed
        assert is_idle(engine)


async def test_a_session_that_was_given_up_cannot_go_on(make_engine, gate_on, span):
    async with make_engine() as engine:
        session = engine.open_session(ALL, 1, 20)
        with gate_on(span) as gate:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(step, engine, session, 5)
                await gate.entered.wait()
                tasks.cancel_scope.cancel()
        with pytest.raises(SessionClosed):
            await step(engine, session, 1)
        engine.close_session(session)
        await decode(engine)  # by now the compute thread has dropped what was given up
        assert is_idle(engine)


@both_paths
async def test_a_session_closed_while_its_step_is_computed_disturbs_nobody(make_engine, gate_on, span):
    async with make_engine() as engine:
        expected = await decode(engine)
        closed = engine.open_session(ALL, 1, 9)
        outputs = []

        async def keep():
            outputs.append(await decode(engine))

        with gate_on(span) as gate:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(decode, engine)
                await gate.entered.wait()
                tasks.start_soon(step, engine, closed, 9)  # both wait for the next tick
                tasks.start_soon(keep)
                await anyio.wait_all_tasks_blocked()
                engine.close_session(closed)
                gate.open()
        assert distance(outputs[0], expected) < 1e-5
        assert closed.rows is None
        with pytest.raises(SessionClosed, match="was closed"):
            await step(engine, closed, 1)
        engine.close_session(closed)
        assert is_idle(engine)


@both_paths
async def test_nothing_of_a_closed_session_stays_in_memory(make_engine):
    async with make_engine() as engine:
        session = engine.open_session(ALL, 2, 9)
        await step(engine, session, 5, 4)
        rows = [weakref.ref(row) for row in session.rows]
        await decode(engine)
        engine.close_session(session)
        gc.collect()
        assert [row() for row in rows] == [None, None]
        session = engine.open_session(ALL, 1, 9)
        await step(engine, session, 5)
        row = weakref.ref(session.rows[0])
        engine.close_session(session)  # its step was the last thing that was computed
        while row() is not None:  # the compute thread is about to let go
            await anyio.lowlevel.checkpoint()


async def test_a_session_has_one_step_at_a_time(make_engine, gate_on, span):
    async with make_engine() as engine:
        session = engine.open_session(ALL, 1, 20)
        with gate_on(span) as gate:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(step, engine, session, 5)
                await gate.entered.wait()
                with pytest.raises(UsageError, match="still under way"):
                    await step(engine, session, 1, starts=(5,))
                gate.open()
        await step(engine, session, 1, starts=(5,))
        engine.close_session(session)


WRONG_STEPS = {
    "beyond what is stored": {"starts": (6, 3)},
    "a negative start": {"starts": (-1, 3)},
    "no row of that number": {"order": (0, 2)},
    "a negative row": {"order": (0, -1)},
    "too short an order": {"order": (0,)},
    "a row too many": {"starts": (5, 3, 0), "counts": (1, 1, 0)},
    "a row without a count": {"counts": (2,)},
    "too few tokens": {"counts": (1, 2)},
    "a negative count": {"counts": (3, -1)},
    "no token at all": {"counts": (0, 0), "hidden_ND": torch.empty(0, 64)},
    "another block's output": {"taps": (4,)},
}


@pytest.mark.parametrize("wrong", WRONG_STEPS.values(), ids=WRONG_STEPS)
@both_paths
async def test_a_wrong_step_is_refused_and_the_session_goes_on(make_engine, wrong):
    right = {"hidden_ND": tokens(2), "starts": (5, 3), "counts": (1, 1)}
    async with make_engine() as engine:
        session = engine.open_session(ALL, 2, 20)
        await step(engine, session, 5, 3)
        with pytest.raises(UsageError):
            await engine.step(session, **right | wrong)
        assert session.lease.held_pages == 2
        assert [row.length for row in session.rows] == [5, 3]
        await engine.step(session, **right)
        engine.close_session(session)


@pytest.mark.parametrize("span", ["qwen3_next"], indirect=True)
async def test_a_family_with_running_states_refuses_to_rewind(make_engine):
    async with make_engine() as engine:
        session = engine.open_session(ALL, 2, 20)
        await step(engine, session, 5, 3)
        with pytest.raises(UsageError, match=r"cannot be rewound from \[5, 3\] to \[4, 3\]"):
            await step(engine, session, 1, 1, starts=(4, 3))
        with pytest.raises(UsageError, match="cannot be rewound"):
            await step(engine, session, 1, 1, starts=(5, 3), order=(0, 0))
        await step(engine, session, 1, 1, starts=(5, 5), order=(0, 0))
        engine.close_session(session)


HIDDEN = torch.zeros(2, 3, 64)
BATCH = {"blocks": ALL, "sequences": Sequences(HIDDEN)}
POSITIONS = torch.arange(3).expand(2, 3)
WRONG_BATCHES = {
    "blocks of others": {"blocks": Span(3, 5)},
    "another block's output": {"blocks": Span(0, 2), "taps": (2,)},
    "no row": {"sequences": Sequences(torch.zeros(0, 3, 64))},
    "no token": {"sequences": Sequences(torch.zeros(2, 0, 64))},
    "no axis of tokens": {"sequences": Sequences(torch.zeros(2, 64))},
    "a mask of another shape": {"sequences": Sequences(HIDDEN, torch.ones(2, 4))},
    "positions of another shape": {"sequences": Sequences(HIDDEN, None, POSITIONS[:1])},
    "a negative position": {"sequences": Sequences(HIDDEN, None, POSITIONS - 1)},
    "a gradient too few": {"taps": (1,), "grads_BTD": (torch.zeros(2, 3, 64),)},
    "a gradient of another shape": {"grads_BTD": (torch.zeros(2, 4, 64),)},
}


@pytest.mark.parametrize("wrong", WRONG_BATCHES.values(), ids=WRONG_BATCHES)
async def test_a_wrong_batch_is_refused(make_engine, wrong):
    async with make_engine() as engine:
        with pytest.raises(UsageError):
            await engine.forward(**BATCH | wrong)
        await engine.forward(**BATCH)


async def test_more_tokens_than_the_model_was_made_for_are_refused(make_engine):
    async with make_engine() as engine:
        with pytest.raises(ContextTooLong, match="257 tokens are more than the 256"):
            engine.open_session(ALL, 1, 257)
        session = engine.open_session(ALL, 1, 256)
        await step(engine, session, 250)
        with pytest.raises(ContextTooLong):
            await step(engine, session, 7, starts=(250,))
        await step(engine, session, 6, starts=(250,))
        engine.close_session(session)
        with pytest.raises(ContextTooLong):
            await engine.forward(ALL, Sequences(torch.zeros(1, 257, 64)))
        with pytest.raises(ContextTooLong):
            await engine.forward(ALL, Sequences(torch.zeros(1, 3, 64), None, torch.tensor([[0, 1, 256]])))


async def test_sessions_on_blocks_that_are_not_here_or_without_rows_are_refused(make_engine):
    async with make_engine() as engine:
        with pytest.raises(UsageError, match="blocks 2:5 were asked of a server that has 0:4"):
            engine.open_session(Span(2, 5), 1, 1)
        with pytest.raises(UsageError, match="at least one"):
            engine.open_session(ALL, 0, 1)
        assert is_idle(engine)


async def test_a_step_without_room_can_be_taken_again_once_there_is_room(make_engine):
    async with make_engine(pages=4) as engine:
        session, other = engine.open_session(ALL, 1, 64), engine.open_session(ALL, 1, 192)
        await step(engine, session, 60)
        with pytest.raises(CacheFull, match="1 more than are free"):
            await step(engine, session, 8, starts=(60,))
        assert session.lease.held_pages == 1
        with pytest.raises(PeerBusy):
            engine.open_session(ALL, 1, 1)
        engine.close_session(other)
        again = await step(engine, session, 8, starts=(60,))
        engine.close_session(session)
        session = engine.open_session(ALL, 1, 192)
        await step(engine, session, 60)
        assert torch.equal(await step(engine, session, 8, starts=(60,)), again)
        engine.close_session(session)
        engine.check_integrity()


async def test_a_full_queue_refuses_steps_and_leaves_their_sessions_as_they_were(make_engine, gate_on, span):
    async with make_engine(queue_length=1) as engine:
        session = engine.open_session(ALL, 2, 100)
        await step(engine, session, 70, 3)
        with gate_on(span) as gate:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(decode, engine)
                await gate.entered.wait()
                with pytest.raises(PeerBusy, match="1 requests are waiting"):
                    await step(engine, session, 1, 1, starts=(1, 1), order=(1, 0))
                with pytest.raises(PeerBusy):
                    await engine.forward(**BATCH)
                assert session.lease.held_pages == 3
                assert [row.length for row in session.rows] == [70, 3]
                gate.open()
        await step(engine, session, 1, 1, starts=(70, 3))
        engine.close_session(session)
        assert is_idle(engine)


async def test_who_waits_when_the_engine_stops_is_told_to_go_elsewhere(make_engine, gate_on, span):
    told = []
    engine = make_engine(tick_tokens=8)

    async def wait():
        with pytest.raises(PeerBusy, match="leaving") as caught:
            await decode(engine, 20)
        told.append(caught.value)

    async def open_gate(gate):
        with gate:
            while not engine._worker._is_stopping:
                await anyio.lowlevel.checkpoint()

    async with anyio.create_task_group() as tasks, engine:
        gate = gate_on(span)
        tasks.start_soon(wait)  # under way, but not complete when the engine stops
        await gate.entered.wait()
        tasks.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        tasks.start_soon(open_gate, gate)
    assert len(told) == 2
    with pytest.raises(PeerBusy, match="leaving"):
        await decode(engine)
    assert is_idle(engine)


async def test_everybody_who_waits_for_the_last_session_hears_of_its_end(make_engine):
    async with make_engine() as engine:
        await engine.wait_until_idle()
        sessions = [engine.open_session(ALL, 1, 1) for _ in range(2)]
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(engine.wait_until_idle)
            tasks.start_soon(engine.wait_until_idle)
            await anyio.wait_all_tasks_blocked()
            for session in sessions:
                engine.close_session(session)


async def test_the_compute_thread_has_its_own_number_of_threads(make_engine, span):
    seen = []
    hook = span.blocks[0].register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    async with make_engine(threads=2) as engine:
        seen.clear()
        await decode(engine)
    hook.remove()
    assert seen == [2]


async def test_an_engine_with_little_room_measures_itself_as_well(make_engine):
    async with make_engine(pages=1) as engine:
        speed = await engine.measure()
    assert speed.decode_tokens_per_s > 0

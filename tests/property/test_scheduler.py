"""Whatever waits, every token is computed once and in order, ticks keep their bounds, and nobody starves."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from corolla.cache import PagePool, RowKV
from corolla.engine.config import EngineConfig
from corolla.engine.scheduler import SHARE_TOKENS, ForwardTick, Scheduler, StepTick
from corolla.engine.work import ForwardWork, Sequences, SessionRows, StepWork
from corolla.errors import ConfigError, PeerBusy
from corolla.terms import Span

SPANS = (Span(0, 4), Span(1, 3))


def step_work(counts, *, starts=None, blocks=SPANS[0], taps=(), client=""):
    session = SessionRows(blocks, PagePool(1).lease(1, 1), tuple(RowKV() for _ in counts), client=client)
    starts = tuple(starts or [0] * len(counts))
    return StepWork(session, torch.empty(sum(counts), 1), starts, tuple(counts), taps=taps)


def forward_work(rows, tokens):
    return ForwardWork(SPANS[0], Sequences(torch.empty(rows, tokens, 1)))


def advance(tick):
    """Do what the compute thread does to a tick's work."""
    if isinstance(tick, ForwardTick):
        tick.work.done_rows = tick.rows.stop
        return [tick.work]
    for work, slices in tick.parts:
        work.done_tokens += sum(part.tokens for part in slices)
    return [work for work, _ in tick.parts]


class Run:
    """A scheduler, and a record of every token that it chose."""

    def __init__(self, **limits):
        self.config = EngineConfig(**limits)
        self.scheduler = Scheduler(self.config)
        self.kinds = ""  # of the ticks so far: s for session tokens, f for training
        self.computed = {}  # work: the offsets, or rows, in the order in which they were chosen
        self.latest = None

    def put(self, work):
        self.scheduler.put(work)
        self.computed[work] = []

    def tick(self, prompt_tokens=None):
        self.latest = tick = self.scheduler.take(prompt_tokens)
        if tick is None:
            return False
        if isinstance(tick, ForwardTick):
            self.kinds += "f"
            self.check_forward(tick)
        else:
            self.kinds += "s"
            self.check_steps(tick)
        for work in advance(tick):
            if work.is_complete:
                self.scheduler.finish(work)
        return True

    def check_forward(self, tick):
        rows = tick.rows.stop - tick.rows.start
        assert rows == 1 or rows * tick.work.hidden_BTD.shape[1] <= self.config.forward_tokens
        self.computed[tick.work] += range(tick.rows.start, tick.rows.stop)

    def check_steps(self, tick):
        assert len({(work.blocks, work.taps) for work, _ in tick.parts}) == 1
        assert 0 < sum(part.tokens for _, slices in tick.parts for part in slices) <= self.config.tick_tokens
        for work, slices in tick.parts:
            assert not work.is_cancelled
            for part in slices:
                first = sum(work.counts[: part.row])  # where the row's tokens are in the step's tensor
                assert part.start == work.starts[part.row] + part.offset - first
                assert first <= part.offset < part.offset + part.tokens <= first + work.counts[part.row]
                self.computed[work] += range(part.offset, part.offset + part.tokens)

    def run_out(self):
        while self.tick():
            pass
        for work, computed in self.computed.items():
            total = len(work.hidden_BTD if isinstance(work, ForwardWork) else work.hidden_ND)
            assert computed == list(range(total)) or (work.is_cancelled and computed == list(range(len(computed))))
        assert len(self.scheduler) == 0


COUNTS = st.lists(st.integers(0, 60), min_size=1, max_size=4).filter(any) | st.just([1])
STEPS = st.builds(step_work, COUNTS, blocks=st.sampled_from(SPANS), taps=st.sampled_from([(), (2,)]))
FORWARDS = st.builds(forward_work, st.integers(1, 6), st.integers(1, 30))
ACTIONS = st.lists(STEPS | FORWARDS | st.just("tick") | st.integers(0, 20), max_size=40)


@given(actions=ACTIONS, tick_tokens=st.integers(1, 100), forward_tokens=st.integers(1, 60), steps=st.integers(1, 5))
def test_every_token_is_computed_once_and_in_order(actions, tick_tokens, forward_tokens, steps):
    run = Run(tick_tokens=tick_tokens, forward_tokens=forward_tokens, steps_per_forward=steps)
    for action in actions:
        if action == "tick":
            run.tick()
        elif isinstance(action, int):  # whoever waited for this one has gone
            if works := list(run.computed):
                works[action % len(works)].is_cancelled = True
        else:
            run.put(action)
    run.run_out()


@given(counts=COUNTS, data=st.data())
def test_slices_divide_a_step_exactly(counts, data):
    starts = [data.draw(st.integers(0, 9)) for _ in counts]
    work = step_work(counts, starts=starts)
    found = [[] for _ in counts]
    while not work.is_complete:
        budget = data.draw(st.integers(1, 70))
        slices = list(work.slices(budget))
        assert sum(part.tokens for part in slices) == min(budget, work.left_tokens)
        for part in slices:
            found[part.row] += [(part.start + at, part.offset + at) for at in range(part.tokens)]
        work.done_tokens += sum(part.tokens for part in slices)
    offsets = iter(range(sum(counts)))
    assert found == [
        [(start + at, next(offsets)) for at in range(count)] for start, count in zip(starts, counts, strict=True)
    ]


@given(decodes=st.integers(1, 20), prompts=st.lists(st.integers(17, 500), min_size=1, max_size=5))
def test_decoding_sessions_have_their_token_in_the_next_tick(decodes, prompts):
    run = Run(tick_tokens=512)
    for prompt in prompts:
        run.put(step_work([prompt]))
    run.tick()
    works = [step_work([1], starts=[9]) for _ in range(decodes)]
    for work in works:
        run.put(work)
    run.tick()
    assert all(work.is_complete for work in works)
    run.run_out()


def test_a_batch_that_decodes_does_not_wait_for_a_long_prompt_to_end():
    run = Run(tick_tokens=64)
    run.put(step_work([10_000]))
    run.tick()
    batch = step_work([1] * 40)
    run.put(batch)
    ticks = 0
    while not batch.is_complete:
        ticks += run.tick()
    assert ticks == -(-40 // SHARE_TOKENS)


@given(waiting=st.integers(1, 80), tick_tokens=st.integers(1, 100))
def test_steps_that_a_tick_had_no_room_for_come_first_in_the_next(waiting, tick_tokens):
    run = Run(tick_tokens=tick_tokens)
    works = [step_work([1]) for _ in range(waiting)]
    for work in works:
        run.put(work)
    finished = []
    while run.tick():
        finished += [work for work, _ in run.latest.parts]
    assert finished == works
    assert len(run.kinds) == -(-waiting // tick_tokens)


def test_the_oldest_of_long_prompts_gets_what_is_left_of_a_tick():
    run = Run(tick_tokens=100)
    prompts = [step_work([300]) for _ in range(3)]
    for work in prompts:
        run.put(work)
    run.tick()
    assert [work.done_tokens for work in prompts] == [100 - 2 * SHARE_TOKENS, SHARE_TOKENS, SHARE_TOKENS]
    run.tick()
    assert [work.done_tokens for work in prompts] == [200 - 4 * SHARE_TOKENS, 2 * SHARE_TOKENS, 2 * SHARE_TOKENS]


@given(
    decodes=st.integers(0, 20),
    prompts=st.lists(st.integers(17, 500), min_size=1, max_size=5),
    limit=st.integers(1, 8).map(lambda shares: shares * SHARE_TOKENS),
)
def test_a_tick_has_no_more_of_prompts_than_it_may(decodes, prompts, limit):
    run = Run(tick_tokens=512)
    works = [step_work([prompt]) for prompt in prompts]
    for work in works:
        run.put(work)
    while not all(work.is_complete for work in works):
        singles = [step_work([1], starts=[9]) for _ in range(decodes)]
        for work in singles:
            run.put(work)
        assert run.tick(limit)
        assert all(work.is_complete for work in singles)
        due = [slices for work, slices in run.latest.parts if work in works]
        assert 0 < sum(part.tokens for slices in due for part in slices) <= limit + SHARE_TOKENS * len(prompts)
        longer = [work for work, slices in run.latest.parts if work in works and work.left_tokens]
        assert sum(sum(part.tokens for part in slices) for work, slices in run.latest.parts if work in longer) <= limit


@given(prompts=st.integers(1, 12), tokens=st.integers(200, 2000))
def test_a_client_with_many_prompts_has_no_more_than_one_with_a_single_one(prompts, tokens):
    run = Run(tick_tokens=512)
    many = [step_work([tokens], client="many") for _ in range(prompts)]
    for work in many:
        run.put(work)
    run.tick()
    single = step_work([tokens], client="single")
    run.put(single)
    had = sum(work.done_tokens for work in many)
    while not single.is_complete:
        run.tick()
        if not single.is_complete and any(work.left_tokens > SHARE_TOKENS for work in many):
            more = sum(work.done_tokens for work in many) - had
            assert abs(more - single.done_tokens) <= 2 * 512


def test_clients_that_train_take_turns():
    run = Run(forward_tokens=8)
    batches = [forward_work(10, 8) for _ in range(3)]
    for batch, client in zip(batches, ("many", "many", "single"), strict=True):
        batch.client = client
        run.put(batch)
    for _ in range(12):
        run.tick()
    assert [batch.done_rows for batch in batches] == [3, 3, 6]


def test_sessions_on_other_blocks_take_turns():
    run = Run(tick_tokens=10)
    works = [step_work([30], blocks=blocks, taps=taps) for blocks in SPANS for taps in [(), (2,)]]
    for work in works:
        run.put(work)
    for _ in range(3):
        for work in works:
            run.tick()
            assert run.latest.parts[0][0] is work


@given(
    steps=st.integers(1, 6),
    sessions=st.lists(st.integers(1, 400), min_size=1, max_size=4),
    batches=st.lists(st.integers(1, 20), min_size=1, max_size=4),
)
def test_sessions_and_training_share_the_ticks(steps, sessions, batches):
    run = Run(tick_tokens=16, forward_tokens=8, steps_per_forward=steps)
    for tokens in sessions:
        run.put(step_work([tokens]))
    for rows in batches:
        run.put(forward_work(rows, 8))
    run.run_out()
    both = run.kinds[: min(run.kinds.rindex("s"), run.kinds.rindex("f")) + 1]  # as long as both were waiting
    assert both.strip("s").count("f") <= both.count("s") // steps + 1
    assert max(map(len, both.split("f"))) <= steps


def test_training_batches_take_turns():
    run = Run(forward_tokens=8)
    large, small = forward_work(100, 8), forward_work(1, 8)
    run.put(large)
    run.put(small)
    run.tick()
    run.tick()
    assert (large.done_rows, small.is_complete) == (1, True)


@given(limit=st.integers(1, 5), trains=st.booleans())
def test_a_full_queue_refuses_work(limit, trains):
    scheduler = Scheduler(EngineConfig(queue_length=limit))
    for _ in range(limit):
        scheduler.put(step_work([1]))
    with pytest.raises(PeerBusy, match=f"{limit} requests are waiting"):
        scheduler.put(forward_work(1, 1) if trains else step_work([1]))
    assert isinstance(scheduler.take(), StepTick)
    scheduler.finish(scheduler.waiting()[0])
    scheduler.put(forward_work(1, 1))


@pytest.mark.parametrize("name", ["threads", "kv_bytes", "tick_tokens", "forward_tokens", "queue_length"])
def test_settings_that_would_stop_everything_are_refused(name):
    with pytest.raises(ConfigError, match=f"{name} is 0; it must be at least 1"):
        EngineConfig(**{name: 0})

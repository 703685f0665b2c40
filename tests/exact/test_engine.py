"""Sessions and batches that share an engine get what each would get alone, from the reference path of the blocks."""

# B batch, T tokens, D model width, N packed tokens

import functools

import anyio
import pytest
import torch

from corolla.blocks import GrowingKV, PackedRow, build_tiny, split_model
from corolla.blocks.zoo import default_config
from corolla.cache import PAGE_TOKENS
from corolla.engine import Engine, EngineConfig, Sequences
from corolla.errors import SessionExpired, UsageError
from corolla.terms import Span

pytestmark = pytest.mark.anyio

PACKABLE = ("llama", "qwen3", "gemma2", "mistral", "llama/dynamic")
"""Their rows share a tick: other kernels than the reference path's, so they are compared up to ``TOLERANCE``."""

OTHERS = ("bloom", "falcon/alibi", "qwen3_next")
"""Their rows run one by one on the reference path itself, so they are equal to the last bit, unless a prompt is cut."""

RECURRENT = ("qwen3_next",)

CUTTABLE = tuple(family for family in PACKABLE + OTHERS if family != "llama/dynamic")
"""Not those whose rotary tables depend on how long a sequence is when it is run."""

TOLERANCE = 1e-5
"""Relative to the largest number, in float32: another kernel, or another cut of a prompt, adds the same products in
another order, which moves a result by some roundings (6e-8 each) in each block; as in tests/exact/test_packed.py."""

SERVED = Span(1, 4)

# Steps of three rows: order, starts, counts. The windows of the tiny models hold 6 tokens, a page 64.
GOING_ON = (
    (None, (0, 0, 0), (14, 3, 1)),  # ragged prompts
    (None, (14, 3, 1), (1, 9, 0)),  # decoding, a second part of a prompt, a row that waits
    ((1, 0, 1), (12, 15, 12), (1, 1, 1)),  # beams: two go on from one
    ((2, 2, 0), (13, 13, 13), (70, 1, 1)),  # and again, over the end of a page
    (None, (83, 14, 14), (1, 1, 1)),
)
REWINDING = (
    *GOING_ON,
    (None, (4, 15, 0), (2, 1, 7)),  # back, far back, to the beginning
    ((2, 2, 0), (7, 3, 6), (1, 40, 66)),  # beams and rewinding at once
    (None, (8, 43, 72), (1, 1, 1)),
)


@functools.cache
def span_of(family):
    return split_model(build_tiny(default_config(family)), [SERVED], is_packable=family in PACKABLE)[0]


@pytest.fixture
def span(family):
    """The blocks of the test's family; made here because a test's event loop must not be blocked."""
    return span_of(family)


def engine_on(span, **limits):
    return Engine(span, EngineConfig(**{"kv_bytes": 1 << 26} | limits), context_tokens=256)


def distance(actual, expected):
    return float((actual - expected).abs().max() / expected.abs().max())


class Alone:
    """A session on the reference path: a cache for each row."""

    def __init__(self, span, blocks, rows):
        self.span = span
        self.blocks = blocks
        self.caches = [span.new_cache() for _ in range(rows)]

    @torch.inference_mode()
    def step(self, hidden_ND, order, starts, counts, taps):
        if order is not None:
            self.caches = [self.caches[source].copy() for source in order]
        outputs = []
        for cache, start, piece_TD in zip(self.caches, starts, hidden_ND.split(counts), strict=True):
            cache.rewind(start)
            if len(piece_TD):
                output_BTD, tapped = self.span(piece_TD[None], cache=cache, blocks=self.blocks, taps=taps)
                outputs.append([output_BTD[0], *(tapped[tap][0] for tap in taps)])
        return [torch.cat(pieces) for pieces in zip(*outputs, strict=True)]


class Session:
    """A session that plays a script, and remembers what came of it."""

    def __init__(self, family, *, seed, blocks=SERVED, taps=()):
        self.script = GOING_ON if family in RECURRENT else REWINDING
        self.seed = seed
        self.blocks = blocks
        self.taps = taps
        self.results = []

    def inputs(self, width):
        generator = torch.Generator().manual_seed(self.seed)
        return [torch.randn(sum(counts), width, generator=generator) for _, _, counts in self.script]

    async def play(self, engine):
        session = engine.open_session(self.blocks, 3, 100)
        for hidden_ND, (order, starts, counts) in zip(self.inputs(engine.span.hidden_size), self.script, strict=True):
            result = await engine.step(session, hidden_ND, starts=starts, counts=counts, order=order, taps=self.taps)
            self.results.append(result.tensors)
            engine.check_integrity()
            pages = sum(-(-(start + count) // PAGE_TOKENS) for start, count in zip(starts, counts, strict=True))
            assert session.lease.held_pages == pages
        engine.close_session(session)

    def distance(self, span):
        """Say how far the results are from those of the reference path, at most; only when no engine runs the span."""
        alone = Alone(span, self.blocks, 3)
        expected = [
            alone.step(hidden_ND, order, starts, counts, self.taps)
            for hidden_ND, (order, starts, counts) in zip(self.inputs(span.hidden_size), self.script, strict=True)
        ]
        assert len(self.results) == len(expected)
        return max(
            distance(*pair)
            for result, tensors in zip(self.results, expected, strict=True)
            for pair in zip(result, tensors, strict=True)
        )


@pytest.mark.parametrize("family", PACKABLE + OTHERS)
async def test_a_session_gets_what_its_rows_get_alone(span, family):
    session = Session(family, seed=0, taps=(2, 1))
    async with engine_on(span) as engine:
        await session.play(engine)
    assert session.distance(span) <= (TOLERANCE if family in PACKABLE else 0)


@pytest.mark.parametrize(
    ("family", "tick_tokens"), [*((family, 5) for family in CUTTABLE), ("llama", 1), ("qwen3_next", 1), ("gemma2", 16)]
)
async def test_prompts_may_be_cut_anywhere(span, family, tick_tokens):
    session = Session(family, seed=1, taps=(3,))
    async with engine_on(span, tick_tokens=tick_tokens) as engine:
        await session.play(engine)
    assert session.distance(span) <= TOLERANCE


@pytest.mark.parametrize(
    ("family", "tick_tokens"),
    [("llama", 24), ("bloom", 24), ("qwen3_next", 24), *((family, 512) for family in PACKABLE + OTHERS)],
)
async def test_sessions_at_once_do_not_see_each_other(span, family, tick_tokens):
    sessions = [  # on all blocks and on some, with taps and without
        Session(family, seed=seed, blocks=SERVED if seed % 3 else Span(2, 3), taps=(2,) if seed % 2 else ())
        for seed in range(6)
    ]
    async with engine_on(span, tick_tokens=tick_tokens) as engine:
        free_tokens = engine.load.free_tokens
        async with anyio.create_task_group() as tasks:
            for session in sessions:
                tasks.start_soon(session.play, engine)
        assert engine.load == (free_tokens, 0, 0)
    is_same = family in OTHERS and tick_tokens == 512
    assert max(session.distance(span) for session in sessions) <= (0 if is_same else TOLERANCE)


@pytest.mark.parametrize("family", PACKABLE)
async def test_a_row_alone_is_equal_to_the_packed_path_over_another_store(span, family):
    kv = GrowingKV()
    hidden_ND = torch.randn(90, span.hidden_size, generator=torch.Generator().manual_seed(3))
    async with engine_on(span) as engine:
        session = engine.open_session(SERVED, 1, 90)
        for start, stop in [(0, 70), (70, 71), (71, 90)]:
            result = await engine.step(session, hidden_ND[start:stop], starts=(start,), counts=(stop - start,))
            with torch.inference_mode():
                expected_ND, _ = span.forward_packed(hidden_ND[start:stop], [PackedRow(start, stop - start, kv)])
            assert torch.equal(result.tensors[0], expected_ND)
        engine.close_session(session)


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
async def test_windows_keep_what_they_see_and_what_may_be_taken_back(span, family):
    hidden_ND = torch.randn(700, span.hidden_size, generator=torch.Generator().manual_seed(4))
    alone = Alone(span, SERVED, 1)
    steps = [(0, 600), (600, 601), (420, 440), (440, 441), (441, 700), (0, 30)]
    expected = [alone.step(hidden_ND[start:stop], None, (start,), (stop - start,), ())[0] for start, stop in steps]
    async with Engine(span, EngineConfig(kv_bytes=1 << 26), context_tokens=1024) as engine:
        session = engine.open_session(SERVED, 1, 700)
        for (start, stop), expected_ND in zip(steps, expected, strict=True):
            result = await engine.step(session, hidden_ND[start:stop], starts=(start,), counts=(stop - start,))
            assert distance(result.tensors[0], expected_ND) <= TOLERANCE
            if start == 600:
                with pytest.raises(SessionExpired, match=r"should keep \[300\] tokens"):
                    await engine.step(session, hidden_ND[300:301], starts=(300,), counts=(1,))
                with pytest.raises(UsageError, match="have let go"):
                    engine.read(session, 0, 500, 501)
        engine.close_session(session)


class Batch:
    """A padded batch, and what autograd makes of it in one piece."""

    def __init__(self, span, taps):
        torch.manual_seed(5)
        rows, tokens = 5, 9
        self.inputs_BTD = torch.randn(rows, tokens, span.hidden_size)
        self.mask_BT = torch.ones(rows, tokens, dtype=torch.long)
        self.mask_BT[1, :4] = self.mask_BT[3, :1] = 0
        self.positions_BT = (self.mask_BT.cumsum(1) - 1).clamp(min=0)
        self.taps = taps
        self.grads_BTD = tuple(torch.randn(rows, tokens, span.hidden_size) for _ in range(1 + len(taps)))
        hidden_BTD = self.inputs_BTD.clone().requires_grad_()
        output_BTD, tapped = span(
            hidden_BTD, attention_mask_BT=self.mask_BT, position_ids_BT=self.positions_BT, taps=taps
        )
        outputs = (output_BTD, *(tapped[tap] for tap in taps))
        self.outputs = [output_BTD.detach() for output_BTD in outputs]
        self.gradient_BTD = torch.autograd.grad(outputs, hidden_BTD, self.grads_BTD)[0]

    async def run(self, engine, grads_BTD=None):
        return (
            await engine.forward(
                SERVED,
                Sequences(self.inputs_BTD, self.mask_BT, self.positions_BT),
                taps=self.taps,
                grads_BTD=grads_BTD,
            )
        ).tensors


@pytest.mark.parametrize("family", PACKABLE + OTHERS)
@pytest.mark.parametrize("taps", [(), (2, 1, 3)])
async def test_a_batch_runs_forward_and_back_as_in_one_piece(span, family, taps):
    batch = Batch(span, taps)
    shown_BT = batch.mask_BT.bool()
    async with engine_on(span) as engine:
        outputs = await batch.run(engine)
        (gradient_BTD,) = await batch.run(engine, batch.grads_BTD)
    for output_BTD, expected_BTD in zip(outputs, batch.outputs, strict=True):
        assert torch.equal(output_BTD[shown_BT], expected_BTD[shown_BT])
    assert torch.equal(gradient_BTD, batch.gradient_BTD)


class Runs:
    """Counts how often blocks run."""

    def __init__(self, span):
        self.count = 0
        self.hooks = [block.register_forward_pre_hook(self.note) for block in span.blocks]

    def note(self, *_):
        self.count += 1

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()


@pytest.mark.parametrize("family", ["llama", "gemma2", "bloom", "qwen3_moe"])
async def test_blocks_keep_what_they_compute_as_far_as_there_is_room(span, family):
    batch = Batch(span, (2,))
    runs = []
    for graph_bytes in (1, *range(1 << 16, 1 << 20, 1 << 15)):
        async with engine_on(span, graph_bytes=graph_bytes) as engine:
            with Runs(span) as seen:
                (gradient_BTD,) = await batch.run(engine, batch.grads_BTD)
        assert torch.equal(gradient_BTD, batch.gradient_BTD)
        runs.append(seen.count)
    assert runs == sorted(runs, reverse=True)
    assert set(runs) == {len(SERVED), len(SERVED) + 1, len(SERVED) + 2}  # the first keeps it in any case


@pytest.mark.parametrize("family", ["llama", "gemma2", "bloom", "qwen3_next"])
async def test_a_batch_may_be_cut_between_its_rows(span, family):
    batch = Batch(span, (2,))
    shown_BT = batch.mask_BT.bool()
    async with engine_on(span, forward_tokens=20) as engine:  # two rows at once, and one at last
        outputs = await batch.run(engine)
        (gradient_BTD,) = await batch.run(engine, batch.grads_BTD)
    for output_BTD, expected_BTD in zip(outputs, batch.outputs, strict=True):
        assert distance(output_BTD[shown_BT], expected_BTD[shown_BT]) <= TOLERANCE
    assert distance(gradient_BTD, batch.gradient_BTD) <= TOLERANCE


@pytest.fixture
def whole(family):
    """A whole model in one span; what enters its first block, and the gradient there, as plain autograd has it."""
    model = build_tiny(default_config(family))
    blocks = next(part for part in model.modules() if isinstance(part, torch.nn.ModuleList) and len(part) == 4)
    seen = {}
    blocks[0].register_forward_pre_hook(lambda _, args, kwargs: seen.update(first=args[0]), with_kwargs=True)
    blocks[3].register_forward_hook(
        lambda _, args, output: seen.update(last=output if isinstance(output, torch.Tensor) else output[0])
    )
    (span,) = split_model(model, [Span(0, 4)])
    model.requires_grad_(True)
    model(input_ids=torch.arange(24).reshape(2, 12) + 3, use_cache=False)
    upstream_BTD = torch.randn_like(seen["last"])
    (gradient_BTD,) = torch.autograd.grad(seen["last"], seen["first"], upstream_BTD)
    return span, seen["first"].detach(), upstream_BTD, gradient_BTD


@pytest.mark.parametrize("family", ["llama", "bloom"])
async def test_a_gradient_is_that_of_the_whole_model(whole):
    span, hidden_BTD, upstream_BTD, expected_BTD = whole
    async with engine_on(span) as engine:
        result = await engine.forward(Span(0, 4), Sequences(hidden_BTD), grads_BTD=(upstream_BTD,))
    assert torch.equal(result.tensors[0], expected_BTD)


@pytest.mark.parametrize("family", ["llama", "llama/dynamic", "phi3/longrope", "bloom", "qwen3_next"])
async def test_sessions_and_training_share_one_process(span, family):
    """What inference leaves in the blocks, as rotary tables that grow, must not stop autograd, nor the other way."""
    batch = Batch(span, ())
    sessions = [Session(family, seed=7), Session(family, seed=8)]
    gradients = []
    async with engine_on(span) as engine:
        await sessions[0].play(engine)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(sessions[1].play, engine)
            for _ in range(3):
                gradients += await batch.run(engine, batch.grads_BTD)
    assert all(torch.equal(gradient_BTD, batch.gradient_BTD) for gradient_BTD in gradients)
    assert max(session.distance(span) for session in sessions) <= TOLERANCE


@pytest.mark.parametrize("family", ["llama", "qwen3_next"])
async def test_an_engine_measures_itself(span):
    async with engine_on(span) as engine:
        speed = await engine.measure()
        assert speed.decode_tokens_per_s > 0
        assert speed.prefill_tokens_per_s > 0
        assert engine.load.sessions == 0

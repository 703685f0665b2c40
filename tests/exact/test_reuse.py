"""What a session need not have computed, because another was, is what it would have been given."""

# N packed tokens, D model width

import functools

import anyio
import pytest
import torch

from corolla.blocks import build_tiny, split_model
from corolla.blocks.zoo import default_config
from corolla.cache import PAGE_TOKENS
from corolla.engine import Engine, EngineConfig
from corolla.engine.measure import page_cost
from corolla.terms import Span

pytestmark = pytest.mark.anyio

FAMILIES = ("llama", "qwen3", "gemma2", "mistral", "gpt_oss", "deepseek_v3", "llama4_text")
"""Among them such with windows, with chunks, with sinks, and with latent attention."""

TOLERANCE = 1e-5
"""Relative to the largest number, in float32: who goes on from a shared beginning adds the same products in another
order, as in tests/exact/test_packed.py."""

SERVED = Span(0, 4)
WHO, OTHER = b"client", b"another"
PROMPT, COMMON = 500, 460  # tokens; seven whole pages are common


@functools.cache
def span_of(family):
    return split_model(build_tiny(default_config(family)), [SERVED], is_packable=True)[0]


@pytest.fixture
def span(family):
    return span_of(family)


def engine_on(span, *, pages=200, **limits):
    kv_bytes = int(pages * PAGE_TOKENS * page_cost(span).token_bytes)
    return Engine(span, EngineConfig(**{"kv_bytes": kv_bytes, "kept_bytes": kv_bytes} | limits), context_tokens=2048)


def states(span, count, seed):
    return torch.randn(count, span.hidden_size, generator=torch.Generator().manual_seed(seed))


def prompts(span):
    """Two prompts that begin alike."""
    first = states(span, PROMPT, 0)
    return first, torch.cat((first[:COMMON], states(span, PROMPT - COMMON, 1)))


def distance(actual, expected):
    return float((actual - expected).abs().max() / expected.abs().max())


class Chat:
    """A session of one row."""

    def __init__(self, engine, scope):
        self.engine = engine
        self.rows = engine.open_session(SERVED, 1, 700, scope=scope)
        self.found = []

    async def step(self, hidden_ND, start, **options):
        result = await self.engine.step(self.rows, hidden_ND, starts=(start,), counts=(len(hidden_ND),), **options)
        self.found.append(result.found_tokens)
        return result.tensors[0]

    def close(self):
        self.engine.close_session(self.rows)
        self.engine.check_integrity()


async def script(chat, hidden_ND):
    """A prompt, an answer, a rewind into what may be shared, and another answer."""
    width = hidden_ND.shape[1]
    more = torch.randn(60, width, generator=torch.Generator().manual_seed(9))
    outputs = [await chat.step(hidden_ND, 0)]
    outputs += [await chat.step(more[at : at + 1], PROMPT + at) for at in range(3)]
    outputs.append(await chat.step(more[3:43], 430))
    outputs += [await chat.step(more[at : at + 1], 427 + at) for at in range(43, 46)]
    return outputs


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("is_ended", [True, False])
async def test_a_session_goes_on_from_what_another_began_with(span, is_ended):
    first, second = prompts(span)
    async with engine_on(span) as engine:
        alone = Chat(engine, None)
        expected = await script(alone, second)
        alone.close()
        earlier = Chat(engine, WHO)
        before = await earlier.step(first, 0)
        if is_ended:
            earlier.close()
        later = Chat(engine, WHO)
        outputs = await script(later, second)
        whole_pages = COMMON // PAGE_TOKENS * PAGE_TOKENS
        assert later.found == [whole_pages, *[0] * 7]
        assert torch.equal(outputs[0][:whole_pages], before[:whole_pages])
        assert max(distance(*pair) for pair in zip(outputs, expected, strict=True)) < TOLERANCE
        if not is_ended:  # whose row the other has gone on from, and who must not notice
            more = states(span, 2, 5)
            found = await earlier.step(more, PROMPT)
            undisturbed = Chat(engine, None)
            await undisturbed.step(first, 0)
            assert torch.equal(found, await undisturbed.step(more, PROMPT))
            undisturbed.close()
            earlier.close()
        later.close()


@pytest.mark.parametrize(("family", "found"), [("llama", [128, 106, 148, 0]), ("gemma2", [0, 106, 148, 0])])
async def test_a_chat_goes_on_in_a_new_session_with_its_answers(span, found):
    """The second turn sends the first prompt and its answer again, in pieces that are cut elsewhere.

    What windows had let go of when the first turn ended cannot be gone on from.
    """
    text = states(span, 600, 3)
    async with engine_on(span, tick_tokens=100) as engine:
        chat = Chat(engine, WHO)
        outputs = [await chat.step(text[:300], 0)]
        outputs += [await chat.step(text[at : at + 1], at) for at in range(300, 450)]
        chat.close()
        turn = Chat(engine, WHO)
        pieces = [await turn.step(text[at : at + 150], at) for at in range(0, 600, 150)]
        assert turn.found == found
        for start, count in zip(range(0, 600, 150), found, strict=True):
            same = slice(start, start + count)
            assert torch.equal(torch.cat(pieces)[same], torch.cat(outputs)[same])
        alone = Chat(engine, None)
        assert distance(torch.cat(pieces), await alone.step(text, 0)) < TOLERANCE
        alone.close()
        turn.close()
        again = Chat(engine, WHO)  # and once more, from the end of the second turn
        first, second = torch.cat(outputs), torch.cat(pieces)
        repeated = await again.step(text, 0)
        assert distance(repeated, second) < TOLERANCE
        assert torch.equal(repeated[448:576], second[448:576])
        if all(found[:3]):  # the second turn has gone on from the first's row, up to there
            assert torch.equal(repeated[:448], first[:448])
        assert again.found == [576]
        again.close()


@pytest.mark.parametrize("family", ["llama"])
async def test_a_prompt_of_whole_pages_is_not_computed_at_all(span):
    text = states(span, 4 * PAGE_TOKENS, 3)
    async with engine_on(span) as engine:
        first, second = Chat(engine, WHO), Chat(engine, WHO)
        expected = await first.step(text, 0)
        assert torch.equal(await second.step(text, 0), expected)
        assert second.found == [len(text)]
        assert distance(await second.step(text[:1], len(text)), await first.step(text[:1], len(text))) < TOLERANCE
        first.close()
        second.close()


@pytest.mark.parametrize("family", ["llama"])
async def test_sessions_at_once_have_a_system_prompt_computed_once(span):
    system = states(span, 5 * PAGE_TOKENS, 0)
    async with engine_on(span) as engine:
        chats = [Chat(engine, WHO) for _ in range(6)]
        outputs = {}

        async def ask(number, chat):
            outputs[number] = await chat.step(torch.cat((system, states(span, 20, 100 + number))), 0)

        await ask(0, chats[0])
        async with anyio.create_task_group() as tasks:
            for number, chat in enumerate(chats[1:], 1):
                tasks.start_soon(ask, number, chat)
        assert [chat.found for chat in chats] == [[0], *[[len(system)]] * 5]
        own_bytes = [chat.rows.rows[0].nbytes for chat in chats]
        assert max(own_bytes[1:]) < own_bytes[0] / 3  # the beginning lies in memory once
        for number, chat in enumerate(chats):
            alone = Chat(engine, None)
            expected = await alone.step(torch.cat((system, states(span, 20, 100 + number))), 0)
            assert distance(outputs[number], expected) < TOLERANCE
            alone.close()
            chat.close()


@pytest.mark.parametrize("family", ["llama"])
async def test_what_differs_is_not_shared(span):
    """Another client, other blocks, other tokens, one bit of the first token: all of them are computed."""
    text = states(span, 200, 3)
    almost = text.clone()
    almost[0, 0] = torch.nextafter(almost[0, 0], torch.tensor(torch.inf))
    async with engine_on(span) as engine:
        first = Chat(engine, WHO)
        await first.step(text, 0)
        first.close()
        for scope, hidden_ND in [(OTHER, text), (None, text), (WHO, almost), (WHO, text[1:])]:
            chat = Chat(engine, scope)
            await chat.step(hidden_ND, 0)
            assert chat.found == [0]
            chat.close()
        rows = engine.open_session(Span(1, 4), 1, 300, scope=WHO)
        assert (await engine.step(rows, text, starts=(0,), counts=(200,))).found_tokens == 0
        engine.close_session(rows)


@pytest.mark.parametrize("family", ["llama"])
async def test_outputs_of_single_blocks_are_computed_when_they_are_asked_for(span):
    text = states(span, 200, 3)
    async with engine_on(span) as engine:
        first, second = Chat(engine, WHO), Chat(engine, WHO)
        await first.step(text, 0, taps=(1,))
        await second.step(text, 0, taps=(1,))
        assert second.found == [0]
        third = Chat(engine, WHO)
        await third.step(text, 0)
        assert third.found == [192]
        for chat in (first, second, third):
            chat.close()


@pytest.mark.parametrize("family", ["llama"])
async def test_rows_of_a_batch_find_each_their_own(span):
    one, two = states(span, 150, 1), states(span, 140, 2)
    async with engine_on(span) as engine:
        for text in (one, two):
            chat = Chat(engine, WHO)
            await chat.step(text, 0)
            chat.close()
        alone = engine.open_session(SERVED, 3, 300)
        shared = engine.open_session(SERVED, 3, 300, scope=WHO)
        new = states(span, 30, 7)
        hidden_ND, counts = torch.cat((two, new, one)), (140, 30, 150)
        expected = await engine.step(alone, hidden_ND, starts=(0, 0, 0), counts=counts)
        result = await engine.step(shared, hidden_ND, starts=(0, 0, 0), counts=counts)
        assert result.found_tokens == 128 + 128
        assert distance(result.tensors[0], expected.tensors[0]) < TOLERANCE
        beams = {"starts": (141, 140, 150), "counts": (1, 1, 1), "order": (0, 0, 2)}
        starts = {"starts": (140, 30, 150), "counts": (1, 1, 1)}
        for options in (starts, beams):
            expected = await engine.step(alone, new[:3], **options)
            result = await engine.step(shared, new[:3], **options)
            assert distance(result.tensors[0], expected.tensors[0]) < TOLERANCE
        engine.close_session(alone)
        engine.close_session(shared)
        engine.check_integrity()


@pytest.mark.parametrize("family", ["llama"])
async def test_what_is_kept_yields_to_whoever_comes(span):
    """Ten pages, all of them kept full: a session that needs them all is let in at once."""
    async with engine_on(span, pages=10) as engine:
        free_tokens = engine.load.free_tokens
        for seed in range(5):
            rows = engine.open_session(SERVED, 1, 180, scope=WHO)
            await engine.step(rows, states(span, 180, seed), starts=(0,), counts=(180,))
            engine.close_session(rows)
            engine.check_integrity()
        assert engine.kept_pages == 9
        assert engine.load.free_tokens == free_tokens
        newest = engine.open_session(SERVED, 1, 180, scope=WHO)
        result = await engine.step(newest, states(span, 180, 4), starts=(0,), counts=(180,))
        assert result.found_tokens == 128
        assert engine.kept_pages <= 7
        engine.close_session(newest)
        whole = engine.open_session(SERVED, 1, 640, scope=OTHER)
        assert engine.kept_pages == 0
        await engine.step(whole, states(span, 640, 9), starts=(0,), counts=(640,))
        engine.close_session(whole)
        engine.check_integrity()


@pytest.mark.parametrize("family", ["llama"])
async def test_a_server_may_keep_nothing(span):
    async with engine_on(span, kept_bytes=1) as engine:
        for _ in range(2):
            chat = Chat(engine, WHO)
            await chat.step(states(span, 200, 0), 0)
            assert chat.found == [0]
            chat.close()
        assert engine.kept_pages == 0


@pytest.mark.parametrize("family", ["llama/dynamic"])
async def test_families_whose_tokens_depend_on_what_follows_share_nothing(span):
    async with engine_on(span) as engine:
        chats = [Chat(engine, WHO) for _ in range(2)]
        for chat in chats:
            await chat.step(states(span, 200, 0), 0)
            assert chat.found == [0]
            chat.close()

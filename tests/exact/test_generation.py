"""A model whose blocks are in a swarm says what transformers says, in every way of generating that transformers has."""

# B batch, T tokens, V vocabulary, D model width

from functools import partial

import anyio
import pytest
import torch
import transformers

from corolla.client import AutoModelForCausalLM, ClientConfig, Swarm
from corolla.errors import ContextTooLong, UsageError

FAMILIES = ["llama", "gemma3_text", "bloom", "qwen3_moe"]
OTHERS = ["gpt2", "opt", "mpt", "phi3/longrope", "gemma4_text"]
TOLERANCE = 2e-5  # of the largest logit: packed rows and batches of another size add in another order
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(params=FAMILIES)
def pair(request, pairs):
    return pairs[request.param]


@pytest.fixture
def llama(pairs):
    return pairs["llama"]


def prompt(rows=1, tokens=7, seed=0):
    return torch.randint(3, 98, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def ragged(side="left"):
    """Three prompts of 9, 5 and 2 tokens, and their mask."""
    ids_BT, mask_BT = prompt(3, 9), torch.ones(3, 9, dtype=torch.long)
    for row, pads in enumerate((0, 4, 7)):
        here = slice(0, pads) if side == "left" else slice(9 - pads, 9)
        ids_BT[row, here], mask_BT[row, here] = 0, 0
    return ids_BT, mask_BT


def close(actual, expected):
    return bool((actual - expected).abs().max() <= TOLERANCE * expected.abs().max())


class Sent:
    """Counts the tokens that a model embeds, which are those that it sends."""

    def __init__(self, model):
        self.tokens = 0
        self.hook = model.get_input_embeddings().register_forward_hook(self.count)

    def count(self, module, args, output):
        self.tokens += output.shape[0] * output.shape[1]

    def take(self):
        tokens, self.tokens = self.tokens, 0
        return tokens


@pytest.fixture
def sent(llama):
    counter = Sent(llama.remote)
    yield counter
    counter.hook.remove()


# Forward


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES + OTHERS)
@pytest.mark.parametrize("side", ["left", "right", None])
def test_logits_of_a_batch_are_equal(family, side, pairs):
    ids_BT, mask_BT = ragged(side) if side else (prompt(3, 9), None)
    expected = pairs[family].local(ids_BT, attention_mask=mask_BT).logits
    assert torch.equal(pairs[family].remote(ids_BT, attention_mask=mask_BT).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES + OTHERS)
def test_logits_of_a_session_are_close(family, pairs):
    ids_BT, mask_BT = ragged()
    positions_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
    extra = {} if family in {"bloom", "mpt"} else {"position_ids": positions_BT}
    expected = pairs[family].local(ids_BT, attention_mask=mask_BT, **extra).logits
    remote = pairs[family].remote
    with remote.session() as session:
        first = remote(ids_BT[:, :8], attention_mask=mask_BT[:, :8], past_key_values=session)
        second = remote(ids_BT[:, 8:], attention_mask=mask_BT, past_key_values=session)
    assert first.past_key_values is session
    assert session.position == 9
    actual = torch.cat([first.logits, second.logits], dim=1)
    real_BT = mask_BT.bool()
    assert close(actual[real_BT], expected[real_BT])


@torch.no_grad()
def test_all_hidden_states_are_equal(pair):
    ids_BT = prompt(2, 9)
    expected = pair.local(ids_BT, output_hidden_states=True).hidden_states
    actual = pair.remote(ids_BT, output_hidden_states=True).hidden_states
    assert len(actual) == len(expected)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(actual, expected, strict=True))


@torch.no_grad()
def test_hidden_states_come_from_the_places_that_were_asked_for(pair):
    ids_BT = prompt(2, 9)
    expected = pair.local(ids_BT, output_hidden_states=True).hidden_states
    with pair.remote.session() as session:
        actual = pair.remote(ids_BT, output_hidden_states=(1, 4), past_key_values=session).hidden_states
    assert [state is not None for state in actual] == [False, True, False, False, True]
    assert all(close(actual[place], expected[place]) for place in (1, 4))


@torch.no_grad()
def test_hidden_states_are_given_when_the_configuration_says_so(llama, monkeypatch):
    monkeypatch.setattr(llama.remote.config, "output_hidden_states", True)
    assert len(llama.remote(prompt()).hidden_states) == 5


def test_a_hidden_state_that_does_not_exist_is_refused(llama):
    with pytest.raises(UsageError, match=r"\[5\].*0 \(the embeddings\) to 4"):
        llama.remote(prompt(), output_hidden_states=(1, 5))


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_without_return_dict_a_tuple_comes(family, pairs):
    remote = pairs[family].remote
    for options in ({}, {"output_hidden_states": True}):
        logits_BTV, *_ = remote(prompt(), return_dict=False, **options)
        assert torch.equal(logits_BTV, remote(prompt(), **options).logits)


# Generation


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"do_sample": True, "temperature": 1.3, "top_k": 20, "top_p": 0.9},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 2, "do_sample": True},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"prompt_lookup_num_tokens": 3},
        {"prefill_chunk_size": 3},
        {"eos_token_id": list(range(3, 40)), "min_new_tokens": 3},
    ],
    ids=lambda options: "-".join(options) or "greedy",
)
def test_tokens_are_the_same(pair, options):
    ids_BT = prompt(1, 8).repeat(1, 2)  # the second half repeats the first, so that looking up drafts succeeds
    pair.assert_same_tokens(ids_BT, max_new_tokens=14, **GREEDY | options)


@pytest.mark.parametrize("family", FAMILIES + OTHERS)
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}], ids=str)
def test_tokens_of_a_ragged_batch_are_the_same(family, pairs, options):
    ids_BT, mask_BT = ragged()
    pairs[family].assert_same_tokens(ids_BT, attention_mask=mask_BT, max_new_tokens=10, **GREEDY | options)


def test_an_assistant_drafts_for_the_swarm(llama):
    llama.assert_same_tokens(prompt(), max_new_tokens=14, assistant_model=llama.local, **GREEDY)


def test_generation_begins_from_embeddings(pair):
    embeddings_BTD = pair.local.get_input_embeddings()(prompt())
    pair.assert_same_tokens(None, inputs_embeds=embeddings_BTD, max_new_tokens=8, **GREEDY)


def test_scores_and_hidden_states_of_generation_are_close(llama):
    options = {
        "max_new_tokens": 4,
        "output_scores": True,
        "output_hidden_states": True,
        "return_dict_in_generate": True,
    }
    expected, actual = (model.generate(prompt(), **GREEDY, **options) for model in (llama.local, llama.remote))
    assert all(close(mine, theirs) for mine, theirs in zip(actual.scores, expected.scores, strict=True))
    for mine, theirs in zip(actual.hidden_states, expected.hidden_states, strict=True):
        assert all(close(one, other) for one, other in zip(mine, theirs, strict=True))


def test_a_streamer_hears_every_token(llama):
    class Streamer(transformers.generation.streamers.BaseStreamer):
        def __init__(self):
            self.heard = []

        def put(self, value):
            self.heard += value.flatten().tolist()

        def end(self):
            self.heard.append("end")

    streamer = Streamer()
    tokens = llama.remote.generate(prompt(), max_new_tokens=6, streamer=streamer, **GREEDY)
    assert streamer.heard == [*tokens[0].tolist(), "end"]


def test_a_stopping_criterion_stops(llama):
    def is_long(ids_BT, scores, **_):
        return torch.full((len(ids_BT),), ids_BT.shape[1] >= 10)

    criteria = transformers.StoppingCriteriaList([is_long])
    assert llama.remote.generate(prompt(), max_new_tokens=20, stopping_criteria=criteria, **GREEDY).shape == (1, 10)


@pytest.mark.parametrize("spans", [["0:4"], ["0:1", "1:4"], ["0:1", "1:3", "3:4"]], ids=len)
def test_tokens_are_the_same_for_any_number_of_hops(llama, spans):
    chosen = [server for server in llama.servers.servers if str(server.server.span) in spans]
    config = ClientConfig(codec="raw", allow_peers=tuple(server.peer_id for server in chosen))
    expected = llama.local.generate(prompt(), max_new_tokens=20, **GREEDY)
    with Swarm(llama.servers.address, config=config) as swarm:
        model = AutoModelForCausalLM.from_pretrained(str(llama.directory), swarm=swarm)
        with model.session() as session:
            assert torch.equal(model.generate(prompt(), max_new_tokens=20, session=session, **GREEDY), expected)
            assert [str(hop.span) for hop in session.chain.hops] == spans


@pytest.mark.anyio
async def test_eight_threads_generate_with_one_model(llama):
    prompts = [prompt(1, 4 + index, seed=index) for index in range(8)]
    expected = [llama.local.generate(ids_BT, max_new_tokens=12, **GREEDY) for ids_BT in prompts]
    actual = [None] * 8

    async def generate(index):
        call = partial(llama.remote.generate, prompts[index], max_new_tokens=12, **GREEDY)
        actual[index] = await anyio.to_thread.run_sync(call)

    async with anyio.create_task_group() as tasks:
        for index in range(8):
            tasks.start_soon(generate, index)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(actual, expected, strict=True))


# Sessions


def test_a_second_turn_sends_only_what_is_new(llama, sent):
    first_BT = prompt(1, 8)
    with llama.remote.session(64) as session:
        turn_BT = llama.remote.generate(first_BT, max_new_tokens=5, session=session, **GREEDY)
        assert sent.take() == 8 + 4  # the last token is never fed
        second_BT = torch.cat([turn_BT, prompt(1, 6, seed=1)], dim=1)
        actual = llama.remote.generate(second_BT, max_new_tokens=5, session=session, **GREEDY)
        assert sent.take() == 1 + 6 + 4
    assert torch.equal(actual, llama.local.generate(second_BT, max_new_tokens=5, **GREEDY))


def test_a_changed_history_rewinds_to_what_is_common(llama, sent):
    first_BT = prompt(1, 12)
    changed_BT = first_BT.clone()
    changed_BT[0, 5] = 3 if first_BT[0, 5] != 3 else 4
    with llama.remote.session(64) as session:
        llama.remote.generate(first_BT, max_new_tokens=5, session=session, **GREEDY)
        sent.take()
        actual = llama.remote.generate(changed_BT, max_new_tokens=5, session=session, **GREEDY)
        assert sent.take() == 12 - 5 + 4
    assert torch.equal(actual, llama.local.generate(changed_BT, max_new_tokens=5, **GREEDY))


def test_the_same_prompt_again_sends_its_last_token(llama, sent):
    with llama.remote.session(64) as session:
        first = llama.remote.generate(prompt(), max_new_tokens=5, session=session, **GREEDY)
        sent.take()
        assert torch.equal(llama.remote.generate(prompt(), max_new_tokens=5, session=session, **GREEDY), first)
    assert sent.take() == 1 + 4


def test_a_session_is_rewound_by_position(pair):
    ids_BT = prompt(2, 10)
    with pair.remote.session(64) as session, torch.no_grad():
        pair.remote(ids_BT, past_key_values=session)
        session.position = 4
        other_BT = torch.cat([ids_BT[:, :4], prompt(2, 5, seed=3)], dim=1)
        actual = pair.remote(other_BT[:, 4:], past_key_values=session).logits
        assert close(actual, pair.local(other_BT).logits[:, 4:])
        with pytest.raises(UsageError, match="cannot rewind to position 10: the session is at position 9"):
            session.position = 10


def test_beams_in_a_session_are_followed_by_another_batch_of_as_many_rows(pair):
    ids_BT = prompt(1, 6)
    with pair.remote.session(64) as session:
        beams_BT = pair.remote.generate(
            ids_BT, max_new_tokens=6, num_beams=3, num_return_sequences=3, session=session, **GREEDY
        )
        next_BT = torch.cat([beams_BT, prompt(3, 2, seed=5)], dim=1)
        actual = pair.remote.generate(next_BT, max_new_tokens=6, session=session, **GREEDY)
    assert torch.equal(actual, pair.local.generate(next_BT, max_new_tokens=6, **GREEDY))


def test_an_empty_session_takes_any_number_of_rows(llama):
    with llama.remote.session(64) as session:
        for rows in (1, 3, 2):
            said = llama.remote.generate(prompt(rows), max_new_tokens=4, session=session, **GREEDY)
            assert torch.equal(said, llama.local.generate(prompt(rows), max_new_tokens=4, **GREEDY))
            with pytest.raises(UsageError, match=f"a prompt of 4 rows in a session of {rows}"):
                llama.remote.generate(prompt(4), max_new_tokens=4, session=session, **GREEDY)
            session.position = 0


def test_a_batch_in_a_session_keeps_its_padding(llama, sent):
    ids_BT, mask_BT = ragged()
    with llama.remote.session(64) as session:
        first_BT = llama.remote.generate(ids_BT, attention_mask=mask_BT, max_new_tokens=4, session=session, **GREEDY)
        sent.take()
        longer = {"attention_mask": torch.cat([mask_BT, torch.ones(3, 4, dtype=torch.long)], dim=1)}
        actual = llama.remote.generate(first_BT, **longer, max_new_tokens=4, session=session, **GREEDY)
        assert sent.take() == 3 * (1 + 3)
    assert torch.equal(actual, llama.local.generate(first_BT, **longer, max_new_tokens=4, **GREEDY))


def test_a_prompt_beyond_the_context_is_refused_with_both_numbers(llama):
    with pytest.raises(ContextTooLong, match="300 tokens.*256"):
        llama.remote.generate(prompt(1, 300), max_new_tokens=1, **GREEDY)


@torch.no_grad()
@pytest.mark.parametrize("drafts", ["all right", "by chance"])
def test_all_that_was_verified_of_a_draft_is_kept(llama, drafts):
    """Petals defect O: the token that verifying a draft gives besides was thrown away, and so computed once more.

    Speculative decoding is transformers' own: a draft of ``n`` tokens costs one step of the swarm and, if it is right,
    gives ``n + 1`` tokens; what is wrong of it is taken off the rows of the servers again.
    """
    ids_BT, steps = prompt(), []
    if drafts == "all right":
        assistant = transformers.AutoModelForCausalLM.from_pretrained(llama.directory, dtype=torch.float32)
        options = {"assistant_model": assistant}
        assistant.generation_config.num_assistant_tokens = 5
        assistant.generation_config.num_assistant_tokens_schedule = "constant"
        assistant.generation_config.assistant_confidence_threshold = 0.0
    else:
        options = {"prompt_lookup_num_tokens": 4}
    expected = llama.local.generate(ids_BT, max_new_tokens=24, **GREEDY)
    counting = llama.remote.get_input_embeddings().register_forward_hook(lambda *_: steps.append(1))
    try:
        said = llama.remote.generate(ids_BT, max_new_tokens=24, **GREEDY, **options)
    finally:
        counting.remove()
    assert torch.equal(said, expected)
    assert len(steps) <= (24 / 6 if drafts == "all right" else 24)

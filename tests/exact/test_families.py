"""Cut into three spans, every family gives bit for bit what transformers' whole model gives."""

# B batch, T tokens, D model width

import copy

import pytest
import torch

from corolla.blocks import FAMILIES, UNSUPPORTED, build_tiny, check_family, split_model
from corolla.blocks.architecture import blocks_of
from corolla.blocks.zoo import default_config, tiny_config
from corolla.terms import Span

PROMPT_TOKENS = 13  # more than a tiny model's sliding window
DECODE_TOKENS = 3
PAD_TOKENS = 4

each_family = pytest.mark.parametrize("family", FAMILIES)


class Watched:
    """The whole model as transformers runs it; notes what enters its first block and what leaves its last."""

    def __init__(self, model):
        self.decoder, name = blocks_of(copy.deepcopy(model))
        blocks = getattr(self.decoder, name)
        blocks[0].register_forward_pre_hook(self.enter, with_kwargs=True)
        blocks[-1].register_forward_hook(self.leave)
        self.past = None

    def enter(self, block, args, kwargs):
        self.first_BTD = args[0] if args else kwargs["hidden_states"]

    def leave(self, block, args, output):
        self.last_BTD = output if isinstance(output, torch.Tensor) else output[0]

    def run(self, **inputs):
        self.past = self.decoder(past_key_values=self.past, **inputs).past_key_values
        return self.first_BTD, self.last_BTD


def make(family):
    model = build_tiny(default_config(family))
    ids_BT = torch.randint(3, 128, (2, PROMPT_TOKENS + DECODE_TOKENS))
    return model, split_model(model), ids_BT


def steps():
    yield slice(0, PROMPT_TOKENS)
    yield from (slice(token, token + 1) for token in range(PROMPT_TOKENS, PROMPT_TOKENS + DECODE_TOKENS))


@each_family
def test_forward_and_gradient_are_those_of_the_whole_model(family):
    model, spans, ids_BT = make(family)
    embeddings = model.get_input_embeddings()
    embeddings.weight.requires_grad_()  # the first block's input must carry a gradient
    first_BTD, last_BTD = Watched(model).run(input_ids=ids_BT, use_cache=False)
    upstream_BTD = torch.randn_like(last_BTD)
    hidden_BTD = first_BTD.detach().requires_grad_()
    output_BTD = hidden_BTD
    for span in spans:
        output_BTD, _ = span(output_BTD)
    assert torch.equal(output_BTD, last_BTD)
    (expected_BTD,) = torch.autograd.grad(last_BTD, first_BTD, upstream_BTD)
    (gradient_BTD,) = torch.autograd.grad(output_BTD, hidden_BTD, upstream_BTD)
    assert torch.equal(gradient_BTD, expected_BTD)


@each_family
@torch.no_grad()
def test_cached_steps_are_those_of_the_whole_model(family):
    model, spans, ids_BT = make(family)
    whole, caches = Watched(model), [span.new_cache() for span in spans]
    for step in steps():
        hidden_BTD, last_BTD = whole.run(input_ids=ids_BT[:, step], use_cache=True)
        for span, cache in zip(spans, caches, strict=True):
            hidden_BTD, _ = span(hidden_BTD, cache=cache)
        assert torch.equal(hidden_BTD, last_BTD), f"tokens {step.start}:{step.stop}"


@each_family
@torch.no_grad()
def test_padded_steps_are_those_of_the_whole_model(family):
    model, spans, ids_BT = make(family)
    whole, caches = Watched(model), [span.new_cache() for span in spans]
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, :PAD_TOKENS] = 0
    positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
    for step in steps():
        inputs = {"input_ids": ids_BT[:, step], "attention_mask": mask_BT[:, : step.stop], "use_cache": True}
        if spans[0].takes_positions:
            inputs["position_ids"] = positions_BT[:, step]
        hidden_BTD, last_BTD = whole.run(**inputs)
        for span, cache in zip(spans, caches, strict=True):
            hidden_BTD, _ = span(
                hidden_BTD,
                attention_mask_BT=mask_BT[:, : step.stop],
                position_ids_BT=positions_BT[:, step],
                cache=cache,
            )
        real_BT = mask_BT[:, step].bool()
        assert torch.equal(hidden_BTD[real_BT], last_BTD[real_BT]), f"tokens {step.start}:{step.stop}"


@each_family
@torch.no_grad()
def test_a_rewound_session_goes_on_as_one_that_never_went_too_far(family):
    model, spans, ids_BT = make(family)
    if not all(span.can_rewind for span in spans):
        pytest.skip("keeps a running state")
    hidden_BTD = torch.randn(2, PROMPT_TOKENS, spans[0].hidden_size)
    for span in spans:
        straight, rewound = span.new_cache(), span.new_cache()
        span(hidden_BTD[:, :9], cache=straight)
        span(hidden_BTD[:, :9], cache=rewound)
        span(torch.randn(2, 4, span.hidden_size), cache=rewound)
        rewound.rewind(11)
        rewound.rewind(9)
        expected_BTD, _ = span(hidden_BTD[:, 9:10], cache=straight)
        assert torch.equal(span(hidden_BTD[:, 9:10], cache=rewound)[0], expected_BTD)


@pytest.mark.parametrize("family", UNSUPPORTED)
def test_families_that_cannot_be_cut_are_refused(family):
    report = check_family(default_config(family))
    assert not report.is_supported
    assert report.reason


@torch.inference_mode()
def test_the_self_test_leaves_the_callers_dice_and_modes_alone():
    before = torch.get_rng_state()
    assert check_family(default_config("llama")).is_packable
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "deepseek_v3", "falcon/alibi", "qwen3_next"])
@torch.no_grad()
def test_part_of_a_span_runs_as_a_span_of_its_own(family):
    model = build_tiny(tiny_config(family))
    whole, part = split_model(model, [Span(0, 4), Span(1, 3)])
    hidden_BTD = torch.randn(1, PROMPT_TOKENS + DECODE_TOKENS, whole.hidden_size)
    caches = whole.new_cache(), part.new_cache()
    for step in steps():
        output_BTD, taps = whole(hidden_BTD[:, step], cache=caches[0], blocks=Span(1, 3), taps={1, 2})
        expected_BTD, expected = part(hidden_BTD[:, step], cache=caches[1], taps={1, 2})
        assert torch.equal(output_BTD, expected_BTD)
        assert torch.equal(taps[2], output_BTD)
        assert torch.equal(taps[1], expected[1])


@torch.no_grad()
def test_a_session_does_not_feel_another_that_was_longer():
    model = build_tiny(tiny_config("llama/dynamic"))
    fresh, busy = split_model(model, [Span(0, 4)] * 2)
    hidden_BTD = torch.randn(1, 60, fresh.hidden_size)
    busy(hidden_BTD)
    assert torch.equal(busy(hidden_BTD[:, :12])[0], fresh(hidden_BTD[:, :12])[0])


@torch.no_grad()
def test_a_failed_step_leaves_the_session_where_it_was():
    (span,) = split_model(build_tiny(tiny_config("llama")), [Span(0, 4)])
    caches = span.new_cache(), span.new_cache()
    hidden_BTD = torch.randn(1, 5, span.hidden_size)
    for cache in caches:
        span(hidden_BTD, cache=cache)
    hook = span.blocks[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        span(hidden_BTD[:, :1], cache=caches[0])
    hook.remove()
    assert torch.equal(*(span(hidden_BTD[:, :1], cache=cache)[0] for cache in caches))


@torch.no_grad()
def test_a_copied_cache_has_the_chosen_rows():
    (span,) = split_model(build_tiny(tiny_config("gemma3_text")), [Span(0, 4)])
    hidden_BTD = torch.randn(3, 9, span.hidden_size)
    cache = span.new_cache()
    span(hidden_BTD, cache=cache)
    rows_B = torch.tensor([2, 0, 0])
    expected_cache = span.new_cache()
    span(hidden_BTD[rows_B], cache=expected_cache)
    step_BTD = torch.randn(3, 1, span.hidden_size)
    copied = cache.copy(rows_B)
    assert copied.size_bytes == cache.size_bytes > 0
    assert torch.equal(span(step_BTD, cache=copied)[0], span(step_BTD, cache=expected_cache)[0])
    assert cache.seen_tokens == 9

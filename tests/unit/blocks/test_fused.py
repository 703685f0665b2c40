"""A decode step in machine code: the numbers of transformers' own blocks up to rounding, whatever rows it has."""

import copy

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, Qwen3Config

from corolla.blocks import PackedRow
from corolla.blocks.architecture import model_class
from corolla.blocks.fused import FusedBlock
from corolla.blocks.lean import LeanBlock
from corolla.blocks.products import FrozenLayer, has_kernels
from corolla.blocks.quantized import quantize
from corolla.blocks.selftest import split_model
from corolla.cache import RowKV
from corolla.terms import Span

pytest.importorskip("llvmlite", reason="machine code is made by llvmlite, which is not installed")
from corolla.machine.kernels import chooses_among_16

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16, "num_hidden_layers": 3}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, num_key_value_heads=2),
    "llama with biases": LlamaConfig(**SIZES, num_key_value_heads=4, attention_bias=True, mlp_bias=True),
    "mistral with a window": MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=8),
    "qwen3 with norms of heads": Qwen3Config(**SIZES, num_key_value_heads=1),
}
PROMPTS = (5, 17, 1, 40, 3, 9, 12, 2, 6)
STEPS = 12
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-6}
"""Relative to the largest number."""


@pytest.fixture(autouse=True, params=[1, 3], ids=["one thread", "three threads"])
def threads(request):
    usual = torch.get_num_threads()
    torch.set_num_threads(request.param)
    if not has_kernels(torch.float32, torch.device("cpu")):
        pytest.skip("torch has no OpenMP runtime here whose threads could be shared")
    yield
    torch.set_num_threads(usual)


def model_of(config):
    """A model whose numbers are the same in bfloat16."""
    torch.manual_seed(3)
    model = model_class(config)(config)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases start out as ones and zeros, which would hide mistakes
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.bfloat16().float().eval()


def span_of(config, dtype=torch.float32):
    (span,) = split_model(model_of(config).to(dtype), [Span(0, 3)], is_packable=True, is_lean=True)
    return span


def rounded_spans(quantization):
    """A span whose weights are rounded, and one whose weights are what they became, in float32."""
    model = model_of(LlamaConfig(**SIZES | {"intermediate_size": 128}, num_key_value_heads=2))
    (span,) = split_model(copy.deepcopy(model).bfloat16(), [Span(0, 3)], is_packable=True)
    (exact,) = split_model(model, [Span(0, 3)], is_packable=True)
    for block, dense in zip(span.blocks, exact.blocks, strict=True):
        quantize(block, quantization)
        for name, layer in block.named_modules():
            if isinstance(layer, FrozenLayer):
                dense.get_submodule(name).weight.data = layer.dense().float()
    span.make_lean()
    return span, exact


def decode(config, rows, dtype=torch.float32, *, is_shared=False):
    """Decode with a span in one dtype, and compare with the same in float32; see :func:`distance`."""
    return distance(span_of(config, dtype), span_of(config), rows, is_shared=is_shared)


def distance(span, exact, rows, *, is_shared=False):
    """Send prompts, then single tokens of all rows at once; return how far they come from the exact path at most."""
    dtype = span.dtype
    sequences = [torch.randn(count + STEPS, 64).bfloat16().to(dtype) for count in PROMPTS[:rows]]
    stores, lengths, worst = [], list(PROMPTS[:rows]), 0.0
    with torch.inference_mode():
        expected = [exact.forward(hidden_ND[None].float())[0][0] for hidden_ND in sequences]
        for hidden_ND, count in zip(sequences, lengths, strict=True):
            kv = RowKV(count + STEPS, span.windows)
            span.forward_packed(hidden_ND[:count], [PackedRow(0, count, kv)])
            kv.commit(count)
            stores.append(kv.fork() if is_shared else kv)
        for _ in range(STEPS):
            new_ND = torch.stack([hidden_ND[length] for hidden_ND, length in zip(sequences, lengths, strict=True)])
            packed = [PackedRow(length, 1, kv) for length, kv in zip(lengths, stores, strict=True)]
            output_ND, _ = span.forward_packed(new_ND, packed)
            for index, kv in enumerate(stores):
                lengths[index] += 1
                kv.commit(lengths[index])
                expected_D = expected[index][lengths[index] - 1]
                worst = max(worst, float((output_ND[index].float() - expected_D).abs().max() / expected_D.abs().max()))
    return worst


@pytest.mark.parametrize("rows", [1, 3, 8, 9])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", CONFIGS)
def test_single_tokens_of_many_rows_give_what_transformers_gives(name, dtype, rows):
    assert {type(block) for block in span_of(CONFIGS[name], dtype)._lean} == {FusedBlock}
    assert decode(CONFIGS[name], rows, dtype) <= TOLERANCE[dtype]


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_rounded_weights_give_what_their_numbers_give(quantization, rows):
    if quantization == "nf4" and not chooses_among_16():
        pytest.skip("this processor does not choose among 16 floats at once")
    span, exact = rounded_spans(quantization)
    assert {type(block) for block in span._lean} == {FusedBlock}
    assert distance(span, exact, rows) <= TOLERANCE[torch.bfloat16]


def test_rows_that_begin_with_keys_and_values_of_others_give_it_as_well():
    assert decode(CONFIGS["llama"], 4, is_shared=True) <= TOLERANCE[torch.float32]


def test_a_token_does_not_depend_on_who_else_is_there():
    span = span_of(CONFIGS["llama"])
    new_ND = torch.randn(8, 64)
    with torch.inference_mode():
        alone = torch.cat([span.forward_packed(new_ND[[index]], [PackedRow(0, 1, RowKV())])[0] for index in range(8)])
        together, _ = span.forward_packed(new_ND, [PackedRow(0, 1, RowKV()) for _ in range(8)])
    assert torch.equal(alone, together)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_what_is_not_a_number_stays_so_and_harms_nobody_else(dtype):
    span = span_of(CONFIGS["llama"], dtype)
    new_ND = torch.randn(3, 64).to(dtype)
    with torch.inference_mode():
        expected_ND, _ = span.forward_packed(new_ND, [PackedRow(0, 1, RowKV()) for _ in range(3)])
        new_ND[1, 5] = torch.nan
        output_ND, _ = span.forward_packed(new_ND, [PackedRow(0, 1, RowKV()) for _ in range(3)])
    assert output_ND[1].isnan().all()
    assert torch.equal(output_ND[[0, 2]], expected_ND[[0, 2]])


@pytest.mark.parametrize("change", [{"head_dim": 8}, {"hidden_act": "gelu"}])
def test_what_there_is_no_code_for_runs_through_lean_blocks(change):
    config = LlamaConfig(**{**SIZES, **change})
    assert {type(block) for block in span_of(config)._lean} == {LeanBlock}
    assert decode(config, 2) <= TOLERANCE[torch.float32]

"""Experts that transformers keeps in one tensor, rounded: gradients are those of the dequantised weights exactly."""

# B batch, T tokens, D model width

from dataclasses import replace

import pytest
import torch
from torch import nn

from corolla.blocks import (
    GrowingKV,
    PackedRow,
    block_bytes,
    check_family,
    load_span,
    model_class,
    restore_span,
    tensors_of,
    tiny_config,
)
from corolla.blocks.products import FrozenLayer
from corolla.blocks.quantized import Experts
from corolla.errors import BadCheckpoint
from corolla.terms import Span

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
SPAN = Span(1, 3)


def save(family, directory):
    """Write a tiny model whose experts are wide enough to be rounded."""
    config = tiny_config(family)
    for name in ("moe_intermediate_size", "intermediate_size"):
        if hasattr(config, name):
            setattr(config, name, 64)
    torch.manual_seed(0)
    model_class(config)(config).save_pretrained(directory)


def outputs(span, hidden_BTD):
    """Give output, gradient, and what the packed path gives."""
    input_BTD = hidden_BTD.clone().requires_grad_()
    output_BTD, _ = span(input_BTD)
    output_BTD.square().sum().backward()
    row_ND = hidden_BTD[0]
    with torch.inference_mode():
        packed_ND, _ = span.forward_packed(row_ND, [PackedRow(0, len(row_ND), GrowingKV())])
    return output_BTD, input_BTD.grad, packed_ND


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_a_span_differentiates_as_its_dequantised_self(family, quantization, tmp_path):
    save(family, tmp_path)
    report = check_family(tiny_config(family))
    loaded = load_span(tmp_path, SPAN, dtype=quantization, report=report)
    dense = load_span(tmp_path, SPAN, dtype=torch.bfloat16, report=replace(report, is_lean=False))
    rounded = [part for part in loaded.blocks.modules() if isinstance(part, Experts)]
    assert len(rounded) == 2 * len([part for part in dense.blocks.modules() if hasattr(part, "is_transposed")]) > 0
    for name, part in loaded.blocks.named_modules():
        if isinstance(part, FrozenLayer) and ".layers." not in name:
            dense.blocks.get_submodule(name).weight.data = part.dense()
        if isinstance(part, Experts):
            weight = dense.blocks.get_parameter(name)
            weight.data = torch.stack([part[index].dense() for index in range(len(weight))])
    for part in dense.modules():
        if hasattr(part, "is_transposed"):
            part.config._experts_implementation = "eager"
    hidden_BTD = torch.randn(2, 9, loaded.hidden_size, dtype=torch.bfloat16)
    for _ in range(2):  # before and after inference
        *exact, packed_ND = outputs(loaded, hidden_BTD)
        *expected, dense_ND = outputs(dense, hidden_BTD)
        assert all(torch.equal(*pair) for pair in zip(exact, expected, strict=True))
        assert float((packed_ND - dense_ND).abs().max() / dense_ND.abs().max()) < 0.05
    assert loaded.weight_bytes == pytest.approx(sum(block_bytes(loaded.config, quantization)[1:3]), rel=0.05)


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3_moe", "gpt_oss", "gpt_neox"])
def test_a_span_of_kept_weights_is_the_very_same(family, quantization, tmp_path):
    save(family, tmp_path)
    report = check_family(tiny_config(family))
    first = load_span(tmp_path, SPAN, dtype=quantization, report=report)
    kept = {index: tensors_of(block) for index, block in zip(SPAN.indices, first.blocks, strict=True)}
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    again = restore_span(tmp_path, SPAN, kept, quantization=quantization, report=report)
    assert again.weight_bytes == first.weight_bytes
    hidden_BTD = torch.randn(2, 9, first.hidden_size, dtype=torch.bfloat16)
    assert all(torch.equal(*pair) for pair in zip(outputs(again, hidden_BTD), outputs(first, hidden_BTD), strict=True))


def test_kept_weights_that_lack_a_tensor_are_refused(tmp_path):
    save("llama", tmp_path)
    report = check_family(tiny_config("llama"))
    first = load_span(tmp_path, SPAN, dtype="int8", report=report)
    kept = {index: tensors_of(block) for index, block in zip(SPAN.indices, first.blocks, strict=True)}
    del kept[1]["input_layernorm.weight"]
    with pytest.raises(BadCheckpoint, match=r"input_layernorm"):
        restore_span(tmp_path, SPAN, kept, quantization="int8", report=report)


def test_what_is_no_product_meets_the_dense_weight(tmp_path):
    from corolla.blocks.quantized import Int8Layer

    layers = [Int8Layer(nn.Linear(64, 32, bias=False).requires_grad_(False)) for _ in range(2)]
    experts = Experts(layers, is_transposed=False)
    assert torch.equal(torch.add(torch.ones(()), experts[1]), 1 + layers[1].dense())
    assert torch.equal(experts[torch.tensor(0)].float(), layers[0].dense())

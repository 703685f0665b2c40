"""Adapters on blocks of eight and four bits: outputs and gradients are those beside the rounded weights, exactly."""

import copy

import pytest
import torch

from corolla.blocks import Adapter, BlockAdapter, LoraPair, build_tiny, split_model
from corolla.blocks.quantized import Int8Layer, Nf4Layer, quantize
from corolla.blocks.zoo import default_config
from corolla.terms import Span

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")


def spans(quantization):
    """Blocks with quantised layers, and with plain ones of the same rounded weights."""
    rounded = split_model(build_tiny(default_config("llama")).bfloat16(), [Span(0, 4)])[0]
    dense = copy.deepcopy(rounded)
    replaced = 0
    for block, twin in zip(rounded.blocks, dense.blocks, strict=True):
        quantize(block, quantization)
        for name, layer in block.named_modules():
            if isinstance(layer, Int8Layer | Nf4Layer):
                twin.get_submodule(name).weight.copy_(layer.dense())
                replaced += 1
    assert replaced >= 4
    return rounded, dense


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_gradients_of_adapters_are_those_beside_the_rounded_weights(quantization):
    torch.manual_seed(0)
    hidden_BTD = torch.randn(2, 9, 64, dtype=torch.bfloat16)
    upstream_BTD = torch.randn(2, 9, 64, dtype=torch.bfloat16)
    plain = {
        index: BlockAdapter((LoraPair("self_attn.q_proj", torch.randn(4, 64), torch.randn(64, 4), 0.5),))
        for index in (0, 2)
    }
    found = []
    for span in spans(quantization):
        for graph_bytes in (0, 1 << 30):
            span.graph_bytes = graph_bytes
            leaves = tuple(tensor.clone().requires_grad_() for tensor in Adapter(plain).tensors)
            input_BTD = hidden_BTD.clone().requires_grad_()
            with span.adapted(Adapter(plain).with_tensors(leaves)):
                output_BTD, _ = span(input_BTD)
                grads = torch.autograd.grad(output_BTD, (input_BTD, *leaves), upstream_BTD)
            found.append((output_BTD.detach(), *grads))
    assert all(bool(grad.abs().max() > 0) for grad in found[0])
    for other in found[1:]:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found[0], other, strict=True))

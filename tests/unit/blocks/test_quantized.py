"""Quantised layers: how far rounding may move a weight, and gradients that are those of the rounded weight exactly."""

import copy
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import linear

from corolla.blocks.quantized import Int8Layer, Nf4Layer, quantize

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

LAYERS = {"int8": Int8Layer, "nf4": Nf4Layer}
ERROR = {"int8": 0.5 / 127 + 2**-8, "nf4": 0.16}
"""Of the largest number of the row, or the group: half a step; the widest gap of nf4's levels is 0.30."""


def layer_of(dtype=torch.bfloat16, *, bias=True, outputs=96, inputs=128):
    torch.manual_seed(outputs)
    return nn.Linear(inputs, outputs, bias=bias, dtype=dtype).requires_grad_(False)


def distance(actual, expected):
    return float((actual.float() - expected.float()).abs().max() / expected.float().abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("quantization", LAYERS)
def test_rounding_moves_a_weight_by_half_a_step_at_most(quantization, dtype):
    layer = layer_of(dtype)
    dense_OI = LAYERS[quantization](layer).dense()
    assert (dense_OI.dtype, dense_OI.shape) == (dtype, layer.weight.shape)
    assert distance(dense_OI, layer.weight) <= ERROR[quantization]


@pytest.mark.parametrize("rows", [1, 3, 5, 40])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("quantization", LAYERS)
@torch.inference_mode()
def test_the_kernel_multiplies_with_the_dense_weight(quantization, bias, rows):
    layer = LAYERS[quantization](layer_of(bias=bias))
    input_NI = torch.randn(rows, 128, dtype=torch.bfloat16)
    expected_NO = linear(input_NI.float(), layer.dense().float(), None if layer.bias is None else layer.bias.float())
    assert distance(layer.multiply(input_NI), expected_NO) < 0.02


def shifted(tensor, nbytes):
    """Give the same numbers at an odd place in memory, as those have that were read from a file."""
    whole = torch.empty(tensor.nbytes + 64 + nbytes, dtype=torch.uint8)
    begin = -whole.data_ptr() % 64 + nbytes
    place = whole[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return place.copy_(tensor)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("nbytes", [8, 16])
@pytest.mark.parametrize("quantization", LAYERS)
@torch.inference_mode()
def test_it_does_not_matter_where_numbers_lie(quantization, nbytes, rows):
    layer = LAYERS[quantization](layer_of())
    stored = {name: shifted(tensor, nbytes) for name, tensor in layer.state_dict().items()}
    moved = LAYERS[quantization](layer_of(), stored)
    input_NI = torch.randn(rows, 128, dtype=torch.bfloat16)
    assert torch.equal(moved.multiply(shifted(input_NI, nbytes)), layer.multiply(input_NI))


@pytest.mark.parametrize("quantization", LAYERS)
def test_gradients_are_those_of_the_dense_weight_before_and_after_inference(quantization):
    layer = LAYERS[quantization](layer_of())
    dense = nn.Linear(128, 96, dtype=torch.bfloat16).requires_grad_(False)
    dense.weight.copy_(layer.dense())
    dense.bias.copy_(layer.bias)

    def gradient(module):
        torch.manual_seed(1)
        input_BTI = torch.randn(2, 9, 128, dtype=torch.bfloat16).requires_grad_()
        output_BTO = module(input_BTI)
        output_BTO.square().sum().backward()
        return output_BTO.detach(), input_BTI.grad

    for _ in range(2):
        for actual, expected in zip(gradient(layer), gradient(dense), strict=True):
            assert torch.equal(actual, expected)
        with torch.inference_mode():
            layer(torch.randn(1, 1, 128, dtype=torch.bfloat16))
            layer.multiply(torch.randn(1, 128, dtype=torch.bfloat16))


def test_layers_that_are_too_narrow_stay_as_they_are():
    block = nn.Sequential(layer_of(), layer_of(outputs=4, inputs=128), layer_of(inputs=100))
    narrow = copy.deepcopy(block[1:])
    quantize(block, "int8")
    assert isinstance(block[0], Int8Layer)
    for kept, original in zip(block[1:], narrow, strict=True):
        assert torch.equal(kept.weight, original.weight)


def test_a_weight_of_zeros_stays_zero():
    for make in LAYERS.values():
        layer = layer_of()
        layer.weight.zero_()
        assert not make(layer).dense().any()


def test_a_process_that_has_rounded_nothing_yet_can_multiply(tmp_path):
    torch.manual_seed(0)
    layer = Nf4Layer(layer_of(bias=False))
    input_NI = torch.randn(1, 128, dtype=torch.bfloat16)
    names = ("packed", "scales", "levels")
    save_file({"input": input_NI} | {name: getattr(layer, name) for name in names}, tmp_path / "in.safetensors")
    program = """
import sys
import torch
from safetensors.torch import load_file, save_file
from corolla.blocks.quantized import Nf4Layer
stored = load_file(sys.argv[1])
input_NI = stored.pop("input")
with torch.inference_mode():
    layer = Nf4Layer(torch.nn.Linear(128, 96, bias=False, device="meta"), stored)
    save_file({"output": layer.multiply(input_NI)}, sys.argv[2])
"""
    files = (str(tmp_path / "in.safetensors"), str(tmp_path / "out.safetensors"))
    subprocess.run([sys.executable, "-c", program, *files], check=True, capture_output=True, timeout=120)
    with torch.inference_mode():
        assert torch.equal(load_file(files[1])["output"], layer.multiply(input_NI))

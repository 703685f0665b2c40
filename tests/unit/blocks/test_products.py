"""Products with frozen weights: the numbers of torch's own up to rounding, and what a head must not miss."""

import copy

import anyio
import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from corolla.blocks.products import Head, Ordered, order, product_with

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-9}
"""Relative to the largest number: the sums are rounded in another order."""


def layer_of(dtype, *, bias, outputs=48, inputs=32):
    return nn.Linear(inputs, outputs, bias=bias, dtype=dtype).requires_grad_(False)


def distance(actual, expected):
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request):
    usual = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(usual)


@pytest.mark.parametrize("rows", [1, 3, 4, 17, 65, 100, 1025])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_is_that_of_torch(threads, dtype, bias, rows):
    layer = layer_of(dtype, bias=bias)
    input_NI = torch.randn(rows, 32).to(dtype)
    with torch.inference_mode():
        output_NO = product_with(order(copy.deepcopy(layer)))(input_NI)
    assert output_NO.dtype == dtype
    assert distance(output_NO.float(), layer(input_NI).float()) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_ordered_layer_multiplies_and_differentiates_as_before(dtype):
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("torch has no oneDNN products in bfloat16 on this machine")
    layer = layer_of(dtype, bias=True)
    ordered = Ordered(layer)
    inputs = [torch.randn(3, 32, dtype=dtype).requires_grad_()]
    inputs.append(inputs[0].detach().clone().requires_grad_())
    outputs = [one(input_NI) for one, input_NI in zip((layer, ordered), inputs, strict=True)]
    for output_NO in outputs:
        output_NO.sum().backward()
    assert torch.equal(*outputs)
    assert torch.equal(inputs[0].grad, inputs[1].grad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_head_notices_that_its_weight_has_changed(dtype):
    head = Head(layer_of(dtype, bias=False))
    input_BTI = torch.randn(1, 1, 32).to(dtype)
    with torch.no_grad():
        head(input_BTI)
        head.weight.mul_(2)  # as an optimiser does
        assert distance(head(input_BTI), linear(input_BTI, head.weight)) <= TOLERANCE[dtype]
        head.weight = nn.Parameter(torch.randn_like(head.weight), requires_grad=False)  # as tying does
        assert distance(head(input_BTI), linear(input_BTI, head.weight)) <= TOLERANCE[dtype]


def test_a_head_has_gradients():
    head = Head(nn.Linear(32, 48))
    input_BTI = torch.randn(2, 5, 32, requires_grad=True)
    head(input_BTI).sum().backward()
    assert input_BTI.grad is not None
    assert head.weight.grad is not None


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_that_ask_a_head_at_once_get_what_each_has_asked(dtype):
    head = Head(layer_of(dtype, bias=True))
    inputs = [torch.randn(1, 1, 32).to(dtype) for _ in range(32)]
    outputs = {}

    def ask(number):
        with torch.inference_mode():
            outputs[number] = head(inputs[number])

    async def ask_all():
        async with anyio.create_task_group() as tasks:
            for number in range(len(inputs)):
                tasks.start_soon(anyio.to_thread.run_sync, ask, number)

    anyio.run(ask_all)
    for number, input_BTI in enumerate(inputs):
        output_BTO = outputs[number]
        assert distance(output_BTO.float(), linear(input_BTI, head.weight, head.bias).float()) <= TOLERANCE[dtype]


def test_a_request_that_fails_leaves_the_others_their_answers():
    head = Head(layer_of(torch.float32, bias=True))
    with torch.no_grad():
        with pytest.raises(RuntimeError):
            head(torch.randn(1, 1, 31))
        assert head(torch.randn(1, 1, 32)).shape == (1, 1, 48)


def test_a_copy_of_a_head_makes_a_product_of_its_own():
    head = Head(layer_of(torch.float32, bias=True))
    with torch.no_grad():
        input_BTI = torch.randn(1, 1, 32)
        output_BTO = head(input_BTI)
        assert torch.equal(copy.deepcopy(head)(input_BTI), output_BTO)

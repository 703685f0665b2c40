"""Products of a few rows with the weights of a block: our kernels beside those of torch, and with fewer bits a weight.

Weights of SmolLM2's shapes, enough copies of them that none is in a cache, one thread; for each number of rows the
contenders take turns, and the best of many rounds counts.
"""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from bench.report import Row, write_report
from corolla.blocks.products import order, product_with
from corolla.blocks.quantized import Int8Layer, Nf4Layer

__all__ = ["main"]

SHAPES = ((1536, 576), (576, 1536), (576, 576))
ROWS = (1, 2, 3, 4, 8, 16)
LARGE_SHAPE = (8192, 2048)
ROUNDED_ROWS = (1, 8)
COPIES_BYTES = 100 << 20
GROUP = 64
ROUNDS = 15
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@torch.inference_mode()
def main() -> None:
    """Measure, print the table, write the report."""
    torch.set_num_threads(1)
    rows: list[Row] = []
    for label, dtype in DTYPES.items():
        for outputs, inputs in SHAPES:
            rows += measure(label, dtype, outputs, inputs)
    for outputs, inputs in (*SHAPES, LARGE_SHAPE):
        rows += measure_rounded(outputs, inputs)
    write_report("products", rows, f"products with {len(SHAPES)} weights of SmolLM2, 1 thread, best of {ROUNDS} rounds")


def measure(label: str, dtype: torch.dtype, outputs: int, inputs: int) -> list[Row]:
    """Compare both for one shape and all numbers of rows."""
    count = COPIES_BYTES // (outputs * inputs * dtype.itemsize)
    with torch.inference_mode(mode=False):
        layers = [nn.Linear(inputs, outputs, bias=False, dtype=dtype).requires_grad_(False) for _ in range(count)]
        products = [product_with(order(layer)) for layer in layers]
    found: list[Row] = []
    for rows in ROWS:
        input_NI = torch.randn(rows, inputs).to(dtype)
        torch_s, ours_s = best_of([layers, products], input_NI)
        what = f"{outputs} x {inputs} {label}, {rows} rows"
        speed = outputs * inputs * dtype.itemsize / 1e9
        found.append(Row(f"torch, {what}", speed / torch_s, "GB/s"))
        found.append(Row(f"product_with, {what}", speed / ours_s, "GB/s", f"torch, {what}", torch_s / ours_s))
    return found


def measure_rounded(outputs: int, inputs: int) -> list[Row]:
    """Compare weights of fewer bits, as servers hold them and as torch's kernel for four bits would have them."""
    count = max(2, COPIES_BYTES // (outputs * inputs))
    with torch.inference_mode(mode=False):
        dense = [
            nn.Linear(inputs, outputs, bias=False, dtype=torch.bfloat16).requires_grad_(False) for _ in range(count)
        ]
        contenders: dict[str, Sequence[Callable[[Tensor], Tensor]]] = {
            "bf16": [product_with(order(layer)) for layer in dense],
            "int8": [Int8Layer(layer).multiply for layer in dense],
            "nf4": [Nf4Layer(layer).multiply for layer in dense],
            "int4 of torch": [int4_product(layer.weight) for layer in dense],
        }
    found: list[Row] = []
    for rows in ROUNDED_ROWS:
        times_s = best_of(list(contenders.values()), torch.randn(rows, inputs).bfloat16())
        what = f"{outputs} x {inputs}, {rows} rows"
        for name, time_s in zip(contenders, times_s, strict=True):
            ratio = None if name == "bf16" else times_s[0] / time_s
            found.append(Row(f"{name}, {what}", time_s * 1e6, "us", None if ratio is None else f"bf16, {what}", ratio))
    return found


def int4_product(weight_OI: Tensor) -> Callable[[Tensor], Tensor]:
    """Multiply by torch's kernel for four bits, evenly spaced, a scale and a zero point for 64 numbers."""
    outputs, inputs = weight_OI.shape
    groups = weight_OI.float().view(outputs, -1, GROUP)
    low, high = groups.amin(-1), groups.amax(-1)
    scale = (high - low) / 15
    numbers_OI = ((groups - low[..., None]) / scale[..., None]).round().clamp(0, 15).int().view(outputs, inputs)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers_OI, 1)
    scales_GO2 = torch.stack([scale, low + 8 * scale], -1).transpose(0, 1).contiguous().bfloat16()
    return lambda input_NI: torch.ops.aten._weight_int4pack_mm_for_cpu(input_NI, packed, GROUP, scales_GO2)


def best_of(contenders: Sequence[Sequence[Callable[[Tensor], Tensor]]], input_NI: Tensor) -> list[float]:
    """The seconds that one product takes each contender, at best."""
    best_s = [float("inf")] * len(contenders)
    for _ in range(ROUNDS):
        for index, functions in enumerate(contenders):
            started_s = time.perf_counter()
            for function in functions:
                function(input_NI)
            best_s[index] = min(best_s[index], (time.perf_counter() - started_s) / len(functions))
    return best_s

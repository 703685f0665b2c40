"""Products of a few rows with the weights of a block: the kernels of ``blocks/products.py`` beside torch's own.

Weights of SmolLM2's shapes, enough copies of them that none is in a cache, one thread; for each number of rows the
contenders take turns, and the best of many rounds counts.
"""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from bench.report import Row, write_report
from corolla.blocks.products import order, product_with

__all__ = ["main"]

SHAPES = ((1536, 576), (576, 1536), (576, 576))
ROWS = (1, 2, 3, 4, 8, 16)
COPIES_BYTES = 100 << 20
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

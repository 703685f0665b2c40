"""What a token costs behind a context of any length: a step beside the attention in it, and what it copies.

Ten blocks of SmolLM2-135M-Instruct, one row, one thread, float32. The row is filled with random keys and values; each
step computes one more token and is not kept, so that all steps of a length do the same. Attention's own cost is torch's
kernel alone, over the very tensors in which the row is stored, once for each block. The largest piece of memory that a
step asks for says whether it copies its context.
"""

# H heads of queries, K heads of keys, T new tokens, L stored tokens, D width of a head

import statistics
import time
from collections.abc import Callable

import torch
from torch.nn.functional import scaled_dot_product_attention

from bench.report import Row, write_report
from corolla.blocks import BlockSpan, PackedRow
from corolla.cache import RowKV
from corolla.engine import EngineConfig
from corolla.hub import HubConfig, stay_silent
from corolla.server import ServerConfig
from corolla.server.loading import load_blocks, open_model
from corolla.terms import Span

__all__ = ["main"]

MODEL = "smollm2"
BLOCKS = Span(0, 10)
LENGTHS = (128, 2048, 8192)
STEPS = 40
ROUNDS = 3


def main() -> None:
    """Measure, print the table, write the report."""
    torch.set_num_threads(1)
    model = open_model(ServerConfig(model=MODEL, precision="float32"), HubConfig(), stay_silent)
    span = load_blocks(model, BLOCKS, EngineConfig(threads=1), stay_silent)
    rows: list[Row] = []
    with torch.inference_mode():
        for tokens in LENGTHS:
            rows += _measure(span, tokens)
    write_report("attention", rows, f"{MODEL}, blocks {BLOCKS}, one row, 1 thread, float32")


def _measure(span: BlockSpan, tokens: int) -> list[Row]:
    row = _filled(span, tokens)
    hidden_ND = torch.randn(1, span.hidden_size)
    heads = span.config.num_attention_heads

    def step() -> None:
        span.forward_packed(hidden_ND, [PackedRow(tokens, 1, row)])

    stored = []
    for block, shape in span.kv_shapes.items():
        new = torch.randn(shape.heads, 1, shape.key_width), torch.randn(shape.heads, 1, shape.value_width)
        query_1KTD = torch.randn(1, shape.heads, heads // shape.heads, shape.key_width)
        stored.append((query_1KTD, *row.append(block, *new)[0]))

    def attend() -> None:
        for query_1KTD, key_KLD, value_KLD in stored:
            scaled_dot_product_attention(query_1KTD, key_KLD[None], value_KLD[None])

    step_s, attention_s = _taken_in_turns(step, attend)
    kv_bytes = sum(key_KLD.nbytes + value_KLD.nbytes for _, key_KLD, value_KLD in stored)
    largest_bytes = _largest_bytes(step)
    name = f"{tokens} tokens"
    return [
        Row(f"{name}: attention alone", attention_s, "s"),
        Row(f"{name}: step", step_s, "s", f"{name}: attention alone", step_s / attention_s),
        Row(f"{name}: step without attention", step_s - attention_s, "s"),
        Row(f"{name}: keys and values of a block", kv_bytes / len(stored), "bytes"),
        Row(f"{name}: largest allocation of a step", largest_bytes, "bytes"),
    ]


def _filled(span: BlockSpan, tokens: int) -> RowKV:
    row = RowKV(tokens + 1)
    for block, shape in span.kv_shapes.items():
        keys, values = (torch.randn(shape.heads, tokens, width) for width in (shape.key_width, shape.value_width))
        row.append(block, keys, values)
    row.commit(tokens)
    return row


def _taken_in_turns(*runs: Callable[[], None]) -> list[float]:
    """Time some functions in turns; give the median of each."""
    taken_s: list[list[float]] = [[] for _ in runs]
    for _ in range(ROUNDS):
        for run, times_s in zip(runs, taken_s, strict=True):
            run()
            for _ in range(STEPS):
                began_s = time.perf_counter()
                run()
                times_s.append(time.perf_counter() - began_s)
    return [statistics.median(times_s) for times_s in taken_s]


def _largest_bytes(run: Callable[[], None]) -> int:
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    return max((event.self_cpu_memory_usage for event in profile.key_averages()), default=0)

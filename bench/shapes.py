"""Large shapes in four bits: steps and prompt tokens a second, and which share of the memory's speed a step reaches.

On a CPU a shape of 1B; where there is a CUDA GPU, those of Llama-3-8B and BLOOM-176B, as far as they fit into its
memory. Weights are seeded random numbers, made on the device: one block is rounded, and each block has a copy of it.
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from transformers import BloomConfig, LlamaConfig

from bench.report import Row, write_report
from corolla.blocks import BlockSpan, PackedRow, block_bytes, check_family, model_class, restore_span, tensors_of
from corolla.blocks.architecture import blocks_of, num_blocks
from corolla.blocks.loading import pruned_class
from corolla.blocks.quantized import COMPUTE_DTYPE, quantize
from corolla.cache import RowKV
from corolla.engine import free_bytes
from corolla.terms import Span

__all__ = ["main"]

LLAMA = {"vocab_size": 1024, "num_key_value_heads": 8, "max_position_embeddings": 8192}
ONE = LlamaConfig(**LLAMA, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32)
EIGHT = LlamaConfig(**LLAMA, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32)
SHAPES: dict[str, dict[str, Any]] = {
    "cpu": {"1B": ONE},
    "cuda": {
        "Llama-3-8B": EIGHT,
        "BLOOM-176B": BloomConfig(vocab_size=1024, hidden_size=14336, n_layer=70, n_head=112),
    },
}
CONTEXTS = (128, 2048)
STEPS = 20
ROOM = 0.8
READ_BYTES = 1 << 30


def main() -> None:
    """Measure each shape that fits, print the table, write the report."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        print("no CUDA GPU is here: the shapes of Llama-3-8B and BLOOM-176B need one; measuring the one of 1B")
    speed = read_speed(device)
    rows = [Row("reading memory", speed / 1e9, "GB/s")]
    for name, config in SHAPES[device.type].items():
        needed_bytes = sum(block_bytes(config, "nf4"))
        if needed_bytes > ROOM * free_bytes(device):
            print(f"skipped: {name} needs {needed_bytes / 1e9:.0f} GB, {free_bytes(device) / 1e9:.0f} GB are free")
            continue
        rows += measure(name, make_span(config, device), speed)
    write_report("shapes", rows, f"shapes in nf4 on {device.type}, {torch.get_num_threads()} threads")


def make_span(config: Any, device: torch.device) -> BlockSpan:
    """Make all blocks of a shape, rounded."""
    span, cls = Span(0, num_blocks(config)), model_class(config)
    torch.manual_seed(0)
    with torch.device(device):
        model = pruned_class(cls, Span(0, 1))(config).to(COMPUTE_DTYPE)
    owner, name = blocks_of(model)
    block = getattr(owner, name)[0].requires_grad_(False)
    quantize(block, "nf4")
    first = tensors_of(block)
    stored = {index: {key: tensor.clone() for key, tensor in first.items()} for index in span.indices}
    with tempfile.TemporaryDirectory() as directory:
        config.save_pretrained(directory)
        report = check_family(config)
        return restore_span(Path(directory), span, stored, quantization="nf4", device=device, report=report)


@torch.inference_mode()
def measure(name: str, span: BlockSpan, speed: float) -> list[Row]:
    """Time steps after contexts of several lengths, and the contexts themselves."""
    rows = [Row(f"{name}: weights", span.weight_bytes / 1e9, "GB")]
    for tokens in track(CONTEXTS, description=name):
        step_s, context_s = times(span, tokens)
        share = span.weight_bytes / step_s / speed
        rows.append(Row(f"{name}: prompt of {tokens}", tokens / context_s, "tokens/s"))
        rows.append(Row(f"{name}: steps after {tokens} tokens", 1 / step_s, "1/s", "reading memory", share))
    return rows


def times(span: BlockSpan, tokens: int) -> tuple[float, float]:
    """The median seconds of a step after so many tokens, and the seconds of these."""
    if not span.is_packable:
        cache = span.new_cache()
        runs = [timed(span, lambda hidden_ND: span(hidden_ND[None], cache=cache), count) for count in counts(tokens)]
    else:
        row, runs = RowKV(), []
        for count in counts(tokens):
            there = [PackedRow(row.length, count, row)]
            runs.append(timed(span, lambda hidden_ND, there=there: span.forward_packed(hidden_ND, there), count))
            row.commit(row.length + count)
    return statistics.median(runs[1:]), runs[0]


def counts(tokens: int) -> list[int]:
    """How many tokens come at once: first the context, then single ones."""
    return [tokens, *[1] * STEPS]


def timed(span: BlockSpan, run: Any, count: int) -> float:
    """The seconds of one run, until the device has done it."""
    hidden_ND = torch.randn(count, span.hidden_size, device=span.device).to(span.dtype)
    synchronize(span.device)
    started_s = time.perf_counter()
    run(hidden_ND)
    synchronize(span.device)
    return time.perf_counter() - started_s


def read_speed(device: torch.device) -> float:
    """How many bytes a second the device can read, at best."""
    numbers = torch.ones(READ_BYTES // 4, device=device)
    best_s = float("inf")
    for _ in range(5):
        synchronize(device)
        started_s = time.perf_counter()
        numbers.sum()
        synchronize(device)
        best_s = min(best_s, time.perf_counter() - started_s)
    return READ_BYTES / best_s


def synchronize(device: torch.device) -> None:
    """Wait until a device has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

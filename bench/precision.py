"""What a precision costs a real model and what it brings: perplexity, memory and speed of SmolLM2-135M's 30 blocks.

All variants read the same text through the packed path that serves sessions; embeddings, norm and head stay in float32.
Speed is that of one server with all blocks, one thread, without a network.
"""

# W windows, T tokens, D model width, V vocabulary

import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from bench.passages import token_windows
from bench.quality import Quality
from bench.report import Row, write_report
from corolla.blocks import BlockSpan, PackedRow, Quantization, check_family, load_config, load_span
from corolla.cache import RowKV
from corolla.hub import HubConfig, load_tokenizer, open_repository
from corolla.terms import Span

__all__ = ["main"]

MODEL = "smollm2"
WINDOWS = 6
WINDOW_TOKENS = 512
STEPS = 40
PRECISIONS: dict[str, torch.dtype | Quantization] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": "int8",
    "nf4": "nf4",
}


@dataclass
class Variant:
    """One precision and what was found of it."""

    name: str
    weight_bytes: int = 0
    quality: Quality = field(default_factory=Quality)
    prefill_s: list[float] = field(default_factory=list)
    decode_s: dict[int, float] = field(default_factory=dict)


def main() -> None:
    """Print the table and write the report."""
    torch.set_num_threads(1)
    repository = open_repository(MODEL, config=HubConfig())
    directory = repository.metadata_directory()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokens_WT = token_windows(load_tokenizer(repository), WINDOWS, WINDOW_TOKENS)
    family = check_family(load_config(directory))
    variants: list[Variant] = []
    references: list[Tensor] = []
    for name, dtype in track(PRECISIONS.items(), description="precisions"):
        blocks = Span(0, len(model.model.layers))
        span = load_span(directory, blocks, dtype=dtype, report=family)
        variants.append(measure(name, span, model, tokens_WT, references))
    title = f"SmolLM2-135M by precision of its blocks; {tokens_WT.numel()} tokens, 1 thread"
    write_report("precision", rows(variants), title, table(variants, title))


@torch.inference_mode()
def measure(name: str, span: BlockSpan, model: Any, tokens_WT: Tensor, references: list[Tensor]) -> Variant:
    """Read the text through a span and hold what comes against the first variant, which fills ``references``."""
    variant = Variant(name, span.weight_bytes)
    for window, tokens_T in enumerate(tokens_WT):
        hidden_TD = model.model.embed_tokens(tokens_T).to(span.dtype)
        started_s = time.perf_counter()
        output_TD, _ = span.forward_packed(hidden_TD, [PackedRow(0, len(tokens_T), RowKV())])
        variant.prefill_s.append(time.perf_counter() - started_s)
        scores_TV = F.log_softmax(model.lm_head(model.model.norm(output_TD.float())), dim=-1)
        if len(references) == window:
            references.append(scores_TV)
        variant.quality.note(scores_TV, references[window], tokens_T)
    variant.decode_s = {count: decode_s(span, count) for count in (1, 8)}
    return variant


def decode_s(span: BlockSpan, count: int) -> float:
    """The median seconds of a step of so many sessions, a token each, after 32 tokens."""
    rows, times_s = [RowKV() for _ in range(count)], []
    for tokens in (32, *[1] * STEPS):
        hidden_ND = torch.randn(count * tokens, span.hidden_size).to(span.dtype)
        started_s = time.perf_counter()
        span.forward_packed(hidden_ND, [PackedRow(row.length, tokens, row) for row in rows])
        times_s.append(time.perf_counter() - started_s)
        for row in rows:
            row.commit(row.length + tokens)
    return statistics.median(times_s[1:])


def rows(variants: list[Variant]) -> list[Row]:
    """Give every number, compared with the same one of the first variant."""
    first, found = variants[0], []
    for one in variants:
        numbers = [
            ("weights", "MiB", one.weight_bytes / 2**20, first.weight_bytes / 2**20),
            ("perplexity", "", one.quality.perplexity, first.quality.perplexity),
            ("prefill of 512", "tokens/s", prefill_rate(one), prefill_rate(first)),
            *((f"decode, {n} at once", "tokens/s", n / one.decode_s[n], n / first.decode_s[n]) for n in one.decode_s),
        ]
        for metric, unit, value, base in numbers:
            versus = None if one is first else f"{first.name}: {metric}"
            found.append(Row(f"{one.name}: {metric}", value, unit, versus, None if one is first else value / base))
        found.append(Row(f"{one.name}: divergence of the next token", one.quality.divergence, "nats"))
        found.append(Row(f"{one.name}: same best token", one.quality.agreement, ""))
    return found


def prefill_rate(variant: Variant) -> float:
    """Tokens per second of a whole window."""
    return WINDOW_TOKENS / statistics.median(variant.prefill_s)


def table(variants: list[Variant], title: str) -> Table:
    """Lay the numbers out, a variant a line."""
    made = Table(title=title)
    made.add_column("precision")
    for heading in ("MiB", "perplexity", "KL, nats", "same token", "prefill/s", "decode/s", "8 at once/s"):
        made.add_column(heading, justify="right")
    for one in variants:
        made.add_row(
            one.name,
            f"{one.weight_bytes / 2**20:.0f}",
            f"{one.quality.perplexity:.3f}",
            f"{one.quality.divergence:.5f}",
            f"{one.quality.agreement:.2%}",
            f"{prefill_rate(one):.0f}",
            *(f"{count / seconds:.1f}" for count, seconds in one.decode_s.items()),
        )
    return made

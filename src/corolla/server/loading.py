"""From a model's name to blocks in memory: what a server settles before it can compute."""

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from corolla import __version__
from corolla.blocks import (
    BlockSpan,
    FamilyReport,
    block_bytes,
    check_family,
    hidden_size,
    load_config,
    load_span,
    needed_keys,
    num_blocks,
    restore_span,
    tensors_of,
    weight_format,
)
from corolla.engine import EngineConfig, computing_threads, free_bytes, kept_apart
from corolla.errors import SpanTooLarge, UnsupportedModel, UsageError
from corolla.hub import HubConfig, Progress, Repository, RoundedWeights, open_repository
from corolla.routing import choose_span
from corolla.server.config import ServerConfig
from corolla.telemetry import event, logger
from corolla.terms import ModelId, Precision, Snapshot, Span

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["Model", "choose_precision", "load_blocks", "open_model"]

_LOG = logger(__name__)
_PRECISIONS: dict[torch.dtype, Precision] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
_WEIGHTS_SHARE = 0.6
"""The share of free memory for weights, when the server chooses how many blocks to serve; the rest is for KV."""


@dataclass(frozen=True, slots=True)
class Model:
    """A model that can be served, and how.

    Args:
        repository: Where its files are.
        config: Its architecture.
        block_bytes: How much memory each of its blocks takes.
        room_bytes: How much memory this server has for them.
        family: What the self-test of its architecture found.
        precision: What to hold weights in.
        device: Where to compute.
        rounded: Where rounded weights are kept.
    """

    repository: Repository
    config: "PreTrainedConfig"
    block_bytes: tuple[int, ...]
    room_bytes: int
    family: FamilyReport
    precision: Precision
    device: str
    rounded: RoundedWeights

    @property
    def num_blocks(self) -> int:
        """How many blocks it has."""
        return len(self.block_bytes)

    @property
    def hidden_size(self) -> int:
        """The width of its hidden states."""
        return hidden_size(self.config)

    def needed_bytes(self, span: Span) -> int:
        """Say how much memory some blocks take."""
        return sum(self.block_bytes[span.start : span.stop])

    def has_room(self, span: Span) -> bool:
        """Say whether some blocks fit into memory now, beside whatever is loaded already."""
        return self.needed_bytes(span) <= _WEIGHTS_SHARE * free_bytes(torch.device(self.device))

    def choose_span(self, claims: Snapshot, count: int | None = None) -> Span:
        """Choose the blocks that the swarm needs the most, of those that fit.

        Args:
            claims: Which servers there are.
            count: How many blocks; ``None`` for as many as there is room for.
        """
        if count is None:
            return choose_span(claims, self.repository.model_id, self.block_bytes, self.room_bytes)
        return choose_span(claims, self.repository.model_id, [1] * self.num_blocks, count)


def open_model(config: ServerConfig, hub: HubConfig, report: Progress) -> Model:
    """Find a model, test its family, and settle how many of its blocks to hold. Blocks for seconds.

    Args:
        config: What to serve.
        hub: Where models are kept.
        report: Hears of downloads.

    Raises:
        ModelError: If the model cannot be found or read.
        UnsupportedModel: If its blocks, run apart from each other, do not give the results of the whole model.
        UsageError: If it has too few blocks for what was asked.
        SpanTooLarge: If what was asked does not fit into free memory.
    """
    repository = open_repository(config.model, config=hub, report=report)
    architecture = load_config(repository.metadata_directory())
    family = check_family(architecture)
    if not family.is_supported:
        raise UnsupportedModel(
            f"{config.model} cannot be served: blocks of family {architecture.model_type!r}, run apart, do not give "
            f"the results of the whole model ({family.reason})"
        )
    total = num_blocks(architecture)
    wanted = len(config.blocks) if config.blocks else config.num_blocks
    if (config.blocks and config.blocks.stop > total) or (wanted or 0) > total:
        raise UsageError(f"{config.model} has {total} blocks, 0:{total}; {config.blocks or wanted} were asked for")
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    available_bytes = free_bytes(torch.device(device))
    room_bytes = available_bytes if wanted else int(available_bytes * _WEIGHTS_SHARE)
    precision = config.precision or choose_precision(architecture, config.blocks, wanted or total, room_bytes)
    sizes = tuple(block_bytes(architecture, weight_format(precision)))
    needed_bytes = _least_bytes(sizes, config.blocks, wanted or 1)
    if needed_bytes > room_bytes:
        raise SpanTooLarge(
            f"{wanted or 1} blocks of {config.model} in {precision} need {needed_bytes / 2**30:.1f} GiB, "
            f"{room_bytes / 2**30:.1f} GiB are free for them; serve fewer blocks with --num-blocks, or free some memory"
        )
    event(_LOG, "room for blocks", room_bytes=room_bytes, model_bytes=sum(sizes), of=len(sizes))
    rounded = RoundedWeights(hub, _facts(repository.model_id, precision, device))
    return Model(repository, architecture, sizes, room_bytes, family, precision, device, rounded)


def _facts(model: ModelId, precision: Precision, device: str) -> list[str]:
    """Name all that decides what rounding gives, and in which order a kernel wants it."""
    kinds = [torch.device(device).type, torch.backends.cpu.get_cpu_capability(), platform.machine()]
    versions = [
        f"{package} {version(package)}"
        for package in ("torch", "transformers", "bitsandbytes")
        if find_spec(package) is not None
    ]
    return [__version__, model, precision, *kinds, *versions]


def choose_precision(architecture: "PreTrainedConfig", blocks: Span | None, count: int, room_bytes: int) -> Precision:
    """Choose what to hold weights in: the model's own format if all wanted blocks fit, or else four bits."""
    own = _PRECISIONS.get(getattr(architecture, "dtype", None) or torch.float32, "float32")
    needed_bytes = _least_bytes(block_bytes(architecture, weight_format(own)), blocks, count)
    fits = needed_bytes <= room_bytes
    chosen: Precision = own if fits or find_spec("bitsandbytes") is None else "nf4"
    reason = "the model's own" if fits else "the wanted blocks do not fit into memory in the model's own"
    if chosen == own and not fits:
        reason += ", and bitsandbytes is not installed: pip install 'corolla[quantized]'"
    event(_LOG, "precision chosen", precision=chosen, why=reason, needed_bytes=needed_bytes, room_bytes=room_bytes)
    return chosen


def _least_bytes(sizes: Sequence[int], blocks: Span | None, count: int) -> int:
    """Say how much memory the given blocks need, or at least so many in a row."""
    if blocks is not None:
        return sum(sizes[blocks.start : blocks.stop])
    return min(sum(sizes[start : start + count]) for start in range(len(sizes) - count + 1))


def load_blocks(model: Model, span: Span, engine: EngineConfig, report: Progress) -> BlockSpan:
    """Download the files of a span, and nothing else, and load its blocks; rounded ones are kept for the next time.

    Blocks for as long as that takes.

    Args:
        model: The model.
        span: Which blocks.
        engine: How they will compute, which decides about the form of their weights.
        report: Hears how far it is.

    Raises:
        ModelError: If files cannot be had or read.
        CapacityError: If there is no room for them.
    """
    with computing_threads(engine):
        return _load_blocks(model, span, report)


def _load_blocks(model: Model, span: Span, report: Progress) -> BlockSpan:
    quantization = weight_format(model.precision)
    if isinstance(quantization, torch.dtype):
        return _load_originals(model, span, report)
    if (kept := model.rounded.find(span.indices)) is not None:
        event(_LOG, "blocks were rounded before", span=span)
        directory = model.repository.metadata_directory()
        with kept_apart():
            return restore_span(
                directory, span, kept, quantization=quantization, device=model.device, report=model.family
            )
    blocks = _load_originals(model, span, report)
    for index, block in zip(span.indices, blocks.blocks, strict=True):
        model.rounded.keep(index, tensors_of(block))
    return blocks


def _load_originals(model: Model, span: Span, report: Progress) -> BlockSpan:
    weight_map = model.repository.weight_map
    directory = model.repository.fetch({weight_map[key] for key in needed_keys(model.config, span, weight_map)})
    label = f"loading blocks {span}"
    with kept_apart():
        return load_span(
            directory,
            span,
            dtype=weight_format(model.precision),
            device=model.device,
            report=model.family,
            progress=lambda done, total: report(label, done, total, "tensors"),
        )

"""From a model's name to blocks in memory: what a server settles before it can compute."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil
import torch

from corolla.blocks import (
    BlockSpan,
    FamilyReport,
    check_family,
    load_config,
    load_span,
    needed_keys,
    num_blocks,
    weight_bytes,
)
from corolla.errors import SpanTooLarge, UnsupportedModel, UsageError
from corolla.hub import HubConfig, Progress, Repository, open_repository
from corolla.server.config import ServerConfig
from corolla.telemetry import event, logger
from corolla.terms import DType, Span

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["Model", "load_blocks", "open_model"]

_LOG = logger(__name__)
_DTYPES: dict[torch.dtype, DType] = {
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
        num_blocks: How many blocks it has.
        span_blocks: How many of them this server will hold.
        family: What the self-test of its architecture found.
        dtype: The precision to compute in.
        device: Where to compute.
    """

    repository: Repository
    config: "PreTrainedConfig"
    num_blocks: int
    span_blocks: int
    family: FamilyReport
    dtype: DType
    device: str


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
    dtype = config.dtype or _DTYPES.get(getattr(architecture, "dtype", None) or torch.float32, "float32")
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    wanted = len(config.blocks) if config.blocks else config.num_blocks
    if (config.blocks and config.blocks.stop > total) or (wanted or 0) > total:
        raise UsageError(f"{config.model} has {total} blocks, 0:{total}; {config.blocks or wanted} were asked for")
    largest = max(weight_bytes(architecture, Span(block, block + 1), getattr(torch, dtype)) for block in (0, total - 1))
    free_bytes = torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available
    if wanted is None:
        wanted = min(total, int(free_bytes * _WEIGHTS_SHARE // largest))
        event(_LOG, "number of blocks chosen", blocks=wanted, of=total, block_bytes=largest, free_bytes=free_bytes)
    if wanted < 1 or wanted * largest > free_bytes:
        raise SpanTooLarge(
            f"{max(wanted, 1)} blocks of {config.model} in {dtype} need {max(wanted, 1) * largest / 2**30:.1f} GiB, "
            f"{free_bytes / 2**30:.1f} GiB are free; serve fewer blocks with --num-blocks, or free some memory"
        )
    return Model(repository, architecture, total, wanted, family, dtype, device)


def load_blocks(model: Model, span: Span, report: Progress) -> BlockSpan:
    """Download the files of a span, and nothing else, and load its blocks. Blocks for as long as that takes.

    Args:
        model: The model.
        span: Which blocks.
        report: Hears how far it is.

    Raises:
        ModelError: If files cannot be had or read.
        CapacityError: If there is no room for them.
    """
    weight_map = model.repository.weight_map
    directory = model.repository.fetch({weight_map[key] for key in needed_keys(model.config, span, weight_map)})
    label = f"loading blocks {span}"
    return load_span(
        directory,
        span,
        dtype=getattr(torch, model.dtype),
        device=model.device,
        report=model.family,
        progress=lambda done, total: report(label, done, total, "tensors"),
    )

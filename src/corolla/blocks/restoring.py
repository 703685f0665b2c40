"""From rounded weights that were kept to the blocks of a span, without rounding them again.

Knows tensors by their names; not where they are kept, nor whether they are the right ones: whoever keeps them does.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from corolla.blocks.architecture import blocks_of, load_config, model_class
from corolla.blocks.loading import build_empty, derive_class, pruned_class, read_model, refuse_missing
from corolla.blocks.quantized import COMPUTE_DTYPE, Quantization, Tensors, hollow, quantize, settle_experts
from corolla.blocks.selftest import FamilyReport
from corolla.blocks.span import BlockSpan
from corolla.blocks.stored import without_format
from corolla.terms import Span

__all__ = ["restore_span"]


def restore_span(
    directory: Path,
    span: Span,
    stored: Mapping[int, Tensors],
    *,
    quantization: Quantization,
    device: torch.device | str = "cpu",
    report: FamilyReport,
) -> BlockSpan:
    """Build blocks from their rounded weights, as :func:`tensors_of` gave them: nothing is rounded or downloaded.

    Args:
        directory: ``config.json``.
        span: Which blocks.
        stored: For each block its tensors.
        quantization: How they were rounded.
        device: Where to put them.
        report: What the self-test of this configuration found.

    Raises:
        BadCheckpoint: If tensors are missing or do not fit.
        UnsupportedModel: If the architecture is unknown.
    """
    config = without_format(load_config(directory))
    cls = _hollow_class(model_class(config), span)
    empty = build_empty(cls, config)
    owner, name = blocks_of(empty)
    path = next(key for key, part in empty.named_modules() if part is getattr(owner, name))
    named = {f"{path}.{index}.{own}": tensor for index in span.indices for own, tensor in stored[index].items()}
    plain = {key: named[key] for key in empty.state_dict() if key in named}
    model, missing = read_model(cls, config, plain, dtype=COMPUTE_DTYPE, device="cpu")
    refuse_missing(missing, directory)
    owner, name = blocks_of(model)
    for index in span.indices:
        quantize(getattr(owner, name)[index].requires_grad_(False), quantization, stored[index])
    model.to(torch.device(device))
    settle_experts(model)
    return BlockSpan(model, span, is_packable=report.is_packable, is_lean=report.is_lean, dtype=COMPUTE_DTYPE)


def _hollow_class(cls: type[PreTrainedModel], span: Span) -> type[PreTrainedModel]:
    """A class like a pruned one whose blocks, besides, lack the weights that are rounded."""
    pruned = pruned_class(cls, span)

    def __init__(self: Any, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        pruned.__init__(self, config, *args, **kwargs)
        owner, name = blocks_of(self)
        for index in span.indices:
            hollow(getattr(owner, name)[index])

    return derive_class(pruned, __init__)

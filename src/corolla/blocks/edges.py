"""The client's part of a model: transformers' own class with embeddings, norm and head, and one call for all blocks.

Generation, heads, losses and adapters of transformers work on it as on the whole model. Knows nothing of sessions and
peers: the remote module that it is given does.
"""

# B batch, T tokens, D model width

from collections.abc import Callable, Iterable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from corolla.blocks.adapters import adaptable_layers
from corolla.blocks.architecture import blocks_of, load_config, model_class
from corolla.blocks.loading import (
    build_empty,
    checkpoint_files,
    derive_class,
    open_tensors,
    read_model,
    refuse_missing,
    select_keys,
)
from corolla.blocks.products import Head
from corolla.blocks.shell import StandIns, find_arity, plain_attributes
from corolla.errors import UsageError

__all__ = ["RemoteBlocks", "RemoteLayer", "load_edges", "needed_edge_keys", "stand_ins_of"]

RemoteBlocks = Callable[[PreTrainedConfig], nn.Module]
"""Builds the module that runs all blocks. It is called once for each forward pass, with the hidden states and whatever
the family's base model gives its first block, and returns hidden states, alone or with the outputs of single blocks."""

_Outputs = tuple[Tensor | None, dict[int, Tensor]]
_NOTHING: _Outputs = (None, {})
_OUTPUTS: ContextVar[_Outputs] = ContextVar("corolla_remote_outputs", default=_NOTHING)


def load_edges(
    directory: Path,
    *,
    auto_class: type = AutoModelForCausalLM,
    remote: RemoteBlocks,
    mixin: type | None = None,
    dtype: torch.dtype,
) -> PreTrainedModel:
    """Load everything of a model but its blocks.

    Args:
        directory: ``config.json``, the checkpoint's index, and those safetensors files that hold the edges' tensors.
        auto_class: Which head: ``AutoModelForCausalLM`` or ``AutoModelForSequenceClassification``.
        remote: Builds the module that runs the blocks.
        mixin: A class to put before the model's own, so that it can override methods.
        dtype: The number format of the edges.

    Returns:
        An instance of transformers' own class for this architecture, in evaluation mode; a head that the checkpoint
        lacks, as that of a classifier, is freshly initialised.

    Raises:
        BadCheckpoint: If files or tensors are missing, damaged, or not safetensors.
        UnsupportedModel: If the architecture is unknown, cannot be cut into spans, or its weights are quantised
            in a way that cannot be read.
    """
    config = load_config(directory)
    blocks = remote(config)
    cls = _edge_class(model_class(config, auto_class), blocks, () if mixin is None else (mixin,))
    files = checkpoint_files(directory)
    keys = select_keys(build_empty(cls, config), files)
    with open_tensors(directory, {key: files[key] for key in keys}, None) as tensors:
        model, missing = read_model(cls, config, tensors, dtype=dtype, device="cpu")
    decoder, name = blocks_of(model)
    if auto_class is not AutoModelForCausalLM:
        inside = {id(parameter) for parameter in decoder.parameters()}
        missing = {name for name in missing if id(model.get_parameter(name)) in inside}
    refuse_missing(missing, directory)
    head = model.get_output_embeddings()
    if type(head) is nn.Linear:
        model.set_output_embeddings(Head(head))
    arity = find_arity(model, dtype, model.device)
    for block in getattr(decoder, name):
        block.arity = arity
    if model.can_generate() and (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory, local_files_only=True)
    return model


def needed_edge_keys(
    config: PreTrainedConfig, index_keys: Iterable[str], auto_class: type = AutoModelForCausalLM
) -> set[str]:
    """Which tensors of a checkpoint the edges need, so that only the files that hold them are downloaded.

    Args:
        config: The model's configuration.
        index_keys: The names of all tensors in the checkpoint, as its index lists them.
        auto_class: Which head.

    Raises:
        UnsupportedModel: If the architecture cannot be cut into spans.
    """
    cls = _edge_class(model_class(config, auto_class), nn.Identity(), ())
    return select_keys(build_empty(cls, config), index_keys)


def _edge_class(cls: type[PreTrainedModel], remote: nn.Module, mixins: tuple[type, ...]) -> type[PreTrainedModel]:
    def __init__(self: Any, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, config, *args, **kwargs)
        decoder, name = blocks_of(self)
        blocks: Any = getattr(decoder, name)
        edges = [_stand_in(block, index, len(blocks)) for index, block in enumerate(blocks)]
        edges[0].remote = remote
        setattr(decoder, name, StandIns(edges))

    return derive_class(cls, __init__, *mixins)


class RemoteLayer(nn.Linear):
    """Stands in the place of a layer inside a block: says its shape, so that PEFT can put an adapter beside it.

    Args:
        inputs: How many numbers the layer takes.
        outputs: How many it gives.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = inputs, outputs
        # PEFT asks the weight where it is and in which format; it has no numbers here.
        self.register_buffer("weight", torch.empty(0), persistent=False)
        self.register_parameter("bias", None)
        self._is_hf_initialized = True

    def forward(self, input: Tensor) -> Tensor:
        """Refuse.

        Raises:
            UsageError: Always: the layer is on servers.
        """
        raise UsageError(f"a layer of {self.in_features} by {self.out_features} runs on servers, inside its block only")


def stand_ins_of(model: PreTrainedModel) -> tuple[nn.Module, ...]:
    """Give what stands in the place of a model's blocks."""
    decoder, name = blocks_of(model)
    return tuple(getattr(decoder, name))


class _EdgeBlock(nn.Module):
    """Stands in a block's place: the first calls the remote module, the others pass on what came of it."""

    remote: nn.Module | None
    index: int
    is_last: bool
    arity: int

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden_BTD = args[0] if args else kwargs["hidden_states"]
        if self.remote is not None:
            outputs = self.remote(*args, **kwargs)
            hidden_BTD, tapped = outputs if isinstance(outputs, tuple) else (outputs, {})
            _OUTPUTS.set((hidden_BTD, tapped))
        # The outputs of single blocks pass through the base model, which may collect them as its hidden states.
        final_BTD, tapped = _OUTPUTS.get()
        if self.is_last:
            _OUTPUTS.set(_NOTHING)
        output_BTD = final_BTD if self.is_last else tapped.get(self.index, hidden_BTD)
        return (output_BTD, *[None] * (self.arity - 1)) if self.arity else output_BTD


def _stand_in(block: nn.Module, index: int, count: int) -> _EdgeBlock:
    # An instance of the block's own class, so that transformers collects its output as that of a block.
    cls: Any = type(type(block).__name__, (_EdgeBlock, type(block)), {"__module__": type(block).__module__})
    cls.forward = _EdgeBlock.forward  # transformers may have wrapped it in checkpointing
    edge: _EdgeBlock = cls.__new__(cls)
    nn.Module.__init__(edge)
    # Some families initialise tensors of their blocks by name, unless this says that it is done.
    edge.__dict__.update(plain_attributes(block), _is_hf_initialized=True)
    edge.remote, edge.index, edge.is_last, edge.arity = None, index, index == count - 1, 0
    for name, (inputs, outputs) in adaptable_layers(block).items():
        *path, last = name.split(".")
        parent: nn.Module = edge
        for step in path:
            if not hasattr(parent, step):
                parent.add_module(step, nn.Module())
            parent = getattr(parent, step)
        parent.add_module(last, RemoteLayer(inputs, outputs))
    return edge

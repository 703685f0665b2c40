"""What a model's configuration says about its shape: how many blocks, how wide, which class of transformers.

Knows Hugging Face configurations and nothing of weights, spans at work, or servers.
"""

import json
import threading
from pathlib import Path
from typing import Any, Final

from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from corolla.blocks.stored import read_plainly
from corolla.errors import BadCheckpoint, UnsupportedModel, UsageError
from corolla.terms import Span

__all__ = [
    "BUILDING",
    "blocks_of",
    "check_span",
    "context_tokens",
    "decoder_of",
    "hidden_size",
    "load_config",
    "model_class",
    "num_blocks",
    "stretched_ropes",
    "text_config",
]

BUILDING: Final = threading.RLock()
"""Held while transformers builds or loads a model: it patches functions of torch for the time being, so a model that
another thread builds meanwhile would stay uninitialised or untied."""


def load_config(directory: Path) -> PreTrainedConfig:
    """Read a model's ``config.json``; code that comes with the model is never run.

    Args:
        directory: Where the model's files are.

    Raises:
        BadCheckpoint: If there is no ``config.json``, or it is malformed.
        UnsupportedModel: If this version of transformers does not know the architecture, or cannot read its weights.
    """
    try:
        raw = json.loads((directory / "config.json").read_bytes())
        kind = raw["model_type"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise BadCheckpoint(f"the config.json in {directory} cannot be read: {error!r}; download it again") from error
    if kind not in CONFIG_MAPPING:
        custom = " It brings its own code, which is never run." if "auto_map" in raw else ""
        raise UnsupportedModel(
            f"the model in {directory} is of the type {kind!r}, which this version of transformers does not know."
            f"{custom} Upgrade transformers, or choose a model of a type that it knows"
        )
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        raise BadCheckpoint(f"the config.json in {directory} is malformed: {error}; tell its owner") from error
    read_plainly(config)
    return config


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The part that describes the language model, where a configuration describes several models."""
    found: PreTrainedConfig = config.get_text_config(decoder=True)
    return found


def num_blocks(config: PreTrainedConfig) -> int:
    """How many blocks the whole model has.

    Raises:
        UnsupportedModel: If the configuration does not say.
    """
    count = getattr(text_config(config), "num_hidden_layers", None)
    if not isinstance(count, int) or count < 1:
        raise UnsupportedModel(f"the configuration of {config.model_type!r} does not say how many blocks it has")
    return count


def hidden_size(config: PreTrainedConfig) -> int:
    """The width of the hidden states that pass from block to block."""
    return int(text_config(config).hidden_size)


def context_tokens(config: PreTrainedConfig) -> int | None:
    """How many tokens the model was made for; ``None`` where its configuration sets no bound."""
    text = text_config(config)
    for name in ("max_position_embeddings", "max_seq_len"):
        tokens = getattr(text, name, None)
        if isinstance(tokens, int) and tokens > 0:
            return tokens
    return None


def model_class(config: PreTrainedConfig, auto_class: type = AutoModelForCausalLM) -> type[PreTrainedModel]:
    """The class of transformers that an auto class would build for a configuration.

    Args:
        config: The model's configuration.
        auto_class: ``AutoModelForCausalLM`` or one of its siblings.

    Raises:
        UnsupportedModel: If transformers has no such class for this architecture.
    """
    mapping: Any = auto_class._model_mapping  # type: ignore[attr-defined]
    if type(config) not in mapping:
        raise UnsupportedModel(f"transformers has no {auto_class.__name__} for {config.model_type!r}")
    found: Any = mapping[type(config)]
    chosen: type[PreTrainedModel] = found[0] if isinstance(found, tuple) else found
    return chosen


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The base model inside a model with a head: the module that owns the blocks.

    Raises:
        UnsupportedModel: If no module owns one list with all blocks.
    """
    return _find_blocks(model)[0]


def blocks_of(model: PreTrainedModel) -> tuple[PreTrainedModel, str]:
    """The base model that owns the blocks, and the name of its list of them.

    Raises:
        UnsupportedModel: If no module owns one list with all blocks.
    """
    return _find_blocks(model)


def check_span(config: PreTrainedConfig, span: Span) -> None:
    """Refuse a span that the model does not have.

    Raises:
        UsageError: If the span ends after the model's last block.
    """
    count = num_blocks(config)
    if span.stop > count:
        raise UsageError(f"blocks {span} were asked for, but the model has {count} blocks: choose within 0:{count}")


def _find_blocks(model: PreTrainedModel) -> tuple[PreTrainedModel, str]:
    count = num_blocks(model.config)
    # The language model may sit one or two modules further down; the shallowest match is its list of blocks. Some
    # families call their head "decoder", hence the base model as well.
    level: list[nn.Module] = [model.get_decoder(), model.base_model]
    while level:
        for owner in level:
            names = [
                name
                for name, child in owner.named_children()
                if isinstance(child, nn.ModuleList) and len(child) == count
            ]
            if len(names) == 1 and isinstance(owner, PreTrainedModel):
                return owner, names[0]
        level = [child for owner in level for child in owner.children() if not isinstance(child, nn.ModuleList)]
    raise UnsupportedModel(
        f"{type(model).__name__} does not keep its {count} blocks in one list, so it cannot be cut into spans"
    )


def stretched_ropes(config: PreTrainedConfig) -> list[tuple[int, bool]]:
    """The rotary tables that depend on a sequence's length: from which length on, and whether with every token.

    "longrope" has a second table for long sequences, "dynamic" one for every length; see transformers'
    ``modeling_rope_utils``.
    """
    ropes: Any = getattr(config, "rope_parameters", None) or {}
    found = []
    for rope in ropes.values() if any(isinstance(value, dict) for value in ropes.values()) else [ropes]:
        kind = rope.get("rope_type", "default") if isinstance(rope, dict) else "default"
        if kind == "longrope":
            found.append((int(rope["original_max_position_embeddings"]), False))
        elif "dynamic" in kind:
            found.append((int(config.max_position_embeddings), True))
    return found

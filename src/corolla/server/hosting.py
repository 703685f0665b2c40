"""Adapters that a server has ready: read from a directory in PEFT's format, the parts of its own blocks alone.

Only LoRA and only safetensors; nothing is unpickled. Knows files; not who keeps what is read.
"""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import anyio
from safetensors import SafetensorError, safe_open

from corolla.blocks import BlockSpan
from corolla.codec import AdapterParts, EncodedAdapter, encode_adapter
from corolla.errors import ConfigError
from corolla.server.adapters import AdapterStore
from corolla.terms import Span

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["host_all", "read_adapter_files"]

_KEY: Final = re.compile(
    r"base_model\.model\.(?P<path>(?:.*?\.)?(?P<block>\d+)\.(?P<name>.+))\.lora_(?P<way>A|B)\.weight"
)


async def host_all(names: Sequence[str], span: BlockSpan, store: AdapterStore) -> None:
    """Have adapters ready.

    Args:
        names: Their directories.
        span: The blocks that the server has.
        store: Where to keep them.

    Raises:
        ConfigError: If one cannot be read.
        UsageError: If one cannot be added to the blocks.
        CapacityError: If there is no room for one.
    """
    for name in names:
        store.host(span, Path(name).name, await anyio.to_thread.run_sync(read_adapter_files, name, span.span))


def read_adapter_files(name: str, span: Span) -> dict[int, EncodedAdapter]:
    """Read what an adapter adds to some blocks.

    Args:
        name: The directory with ``adapter_config.json`` and ``adapter_model.safetensors``.
        span: Which blocks.

    Raises:
        ConfigError: If there is no such adapter, or it is not plain LoRA.
    """
    directory = Path(name).expanduser()
    try:
        config = json.loads((directory / "adapter_config.json").read_bytes())
        with safe_open(directory / "adapter_model.safetensors", framework="pt") as file:
            found = {match: file.get_tensor(key) for key in file.keys() if (match := _KEY.fullmatch(key))}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"{directory} holds no adapter in PEFT's format: {error}") from error
    if config.get("peft_type") != "LORA" or config.get("use_dora") or config.get("lora_bias"):
        raise ConfigError(f"the adapter in {directory} is not plain LoRA, which alone can be had ready on servers")
    pairs: dict[tuple[int, str, str], dict[str, Tensor]] = {}
    for match, tensor in found.items():
        place = int(match["block"]), match["name"], match["path"]
        pairs.setdefault(place, {})[match["way"]] = tensor
    blocks: dict[int, list[tuple[str, Tensor, Tensor, float]]] = {}
    for (block, name, path), ways in sorted(pairs.items()):
        if block in span and len(ways) == 2:
            scaling = _scaling(config, path, len(ways["A"]))
            blocks.setdefault(block, []).append((name, ways["A"], ways["B"], scaling))
    if not pairs:
        raise ConfigError(f"the adapter in {directory} adds nothing to any block")
    return {block: encode_adapter(AdapterParts(parts, None)) for block, parts in blocks.items()}


def _scaling(config: dict[str, Any], path: str, ranks: int) -> float:
    """Say what a pair's product is multiplied by: alpha over the ranks, or over their root in rank-stabilised LoRA."""
    patterns = config.get("alpha_pattern") or {}
    own = [value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", path)]
    alpha = float(own[0] if own else config.get("lora_alpha", ranks))
    return alpha / math.sqrt(ranks) if config.get("use_rslora") else alpha / ranks

"""Adapters that a server has ready: read from a directory in PEFT's format, the parts of its own blocks alone.

Only LoRA and prefixes, and only safetensors; nothing is unpickled. Knows files; not who keeps what is read.
"""

# P tokens of a prefix, B keys and values of blocks, K key heads, W head width, F all numbers of a token

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, cast

import anyio
from safetensors import SafetensorError, safe_open

from corolla.blocks import BlockSpan
from corolla.codec import AdapterParts, EncodedAdapter, encode_adapter
from corolla.errors import BadAdapter, UsageError
from corolla.hub import HubConfig, Repository
from corolla.server.adapters import AdapterStore
from corolla.server.loading import Model
from corolla.sharing import AdapterFiles, bring_files
from corolla.terms import Span

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["host_all", "read_blocks"]

_KEY: Final = re.compile(
    r"base_model\.model\.(?P<path>(?:.*?\.)?(?P<block>\d+)\.(?P<name>.+))\.lora_(?P<way>A|B)\.weight"
)


async def host_all(names: Sequence[str], span: BlockSpan, store: AdapterStore, model: Model, hub: HubConfig) -> None:
    """Have adapters ready.

    Args:
        names: What :func:`corolla.sharing.bring_files` knows: directories, ids or names, or ``owner/name``.
        span: The blocks that the server has.
        store: Where to keep them.
        model: What the server serves.
        hub: Where models and adapters are kept.

    Raises:
        BadAdapter: If one cannot be read, or cannot be had ready on servers.
        AdapterNotFound: If there is none of that name.
        UsageError: If one cannot be added to the blocks, or is for other weights.
        CapacityError: If there is no room for one.
    """
    for name in names:
        files = await anyio.to_thread.run_sync(_open, name, model.repository, hub)
        store.host(span, files.label, await anyio.to_thread.run_sync(read_blocks, files, span.span))


def _open(name: str, model: Repository, hub: HubConfig) -> AdapterFiles:
    files = bring_files(name, hub)
    files.check_base(model.model_id, model.name, hub)
    return files


def read_blocks(files: AdapterFiles, span: Span) -> dict[int, EncodedAdapter]:
    """Read what an adapter adds to some blocks.

    Args:
        files: The adapter.
        span: Which blocks.

    Raises:
        BadAdapter: If it is neither plain LoRA nor a prefix, or adds nothing.
        UsageError: If it is a prefix for fewer blocks.
    """
    directory, config = files.directory, files.settings
    if files.method == "prefix_tuning":
        return _read_prefixes(files, span)
    if files.method != "lora" or config.get("use_dora") or config.get("lora_bias"):
        raise BadAdapter(
            f"the adapter in {directory} is neither plain LoRA nor a prefix, which alone can be had ready on servers; "
            "clients can use it without"
        )
    try:
        with safe_open(directory / "adapter_model.safetensors", framework="pt") as file:
            found = {match: file.get_tensor(key) for key in file.keys() if (match := _KEY.fullmatch(key))}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise BadAdapter(f"the adapter in {directory} cannot be read: {error}") from error
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
        raise BadAdapter(f"the adapter in {directory} adds nothing to any block")
    return {block: encode_adapter(AdapterParts(parts, None)) for block, parts in blocks.items()}


def _read_prefixes(files: AdapterFiles, span: Span) -> dict[int, EncodedAdapter]:
    """Read keys and values that stand before the first token of every text, as PEFT lays them out: for all blocks in a
    row, so many numbers of each token."""
    sizes = [files.settings.get(name) for name in ("num_virtual_tokens", "num_layers", "num_attention_heads")]
    try:
        with safe_open(files.directory / "adapter_model.safetensors", framework="pt") as file:
            all_PF = file.get_tensor("prompt_embeddings")
        if files.settings.get("prefix_projection") or not all(isinstance(size, int) and size > 0 for size in sizes):
            raise BadAdapter(f"the prefix in {files.directory} is not one of keys and values")
        tokens, blocks, heads = cast("list[int]", sizes)
        parts_PBKW = all_PF.view(tokens, 2 * blocks, heads, -1)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise BadAdapter(f"the prefix in {files.directory} cannot be read: {error}") from error
    if span.stop > blocks:
        raise UsageError(f"the prefix in {files.directory} is for {blocks} blocks; was it made for another model?")
    found = {}
    for block in span.indices:
        key_KPW, value_KPW = (parts_PBKW[:, 2 * block + way].transpose(0, 1) for way in (0, 1))
        found[block] = encode_adapter(AdapterParts([], (key_KPW, value_KPW)))
    return found


def _scaling(config: dict[str, Any], path: str, ranks: int) -> float:
    """Say what a pair's product is multiplied by: alpha over the ranks, or over their root in rank-stabilised LoRA."""
    patterns = config.get("alpha_pattern") or {}
    own = [value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", path)]
    alpha = float(own[0] if own else config.get("lora_alpha", ranks))
    return alpha / math.sqrt(ranks) if config.get("use_rslora") else alpha / ranks

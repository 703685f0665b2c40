"""A prefix as transformers sees it: a cache that is full from the start and takes nothing more.

Knows transformers' cache layers; not where a prefix comes from.
"""

# B batch, K key heads, T new tokens, P tokens of the prefix, W head width

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig

from corolla.blocks.adapters import Adapter, Prefix
from corolla.blocks.session_cache import AbsentLayer
from corolla.errors import UsageError

__all__ = ["PrefixCache"]


class _PrefixLayer(AbsentLayer):
    """Gives a block its prefix, with what is new behind it, as often as it asks: also when it is run again."""

    def __init__(self, prefix: Prefix, *, is_sliding: bool) -> None:
        super().__init__(is_sliding=is_sliding)
        self._prefix = prefix
        self.seen_tokens = prefix.key_KPW.shape[1]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Put the prefix before new keys and values."""
        joined = []
        for part_KPW, new_BKTW in zip(self._prefix, (key_states, value_states), strict=True):
            part_BKPW = part_KPW.to(new_BKTW.dtype)[None].expand(len(new_BKTW), -1, -1, -1)
            joined.append(torch.cat((part_BKPW, new_BKTW), dim=2))
        return joined[0], joined[1]


class PrefixCache(DynamicCache):  # type: ignore[misc]
    """The prefixes of some blocks, for one run of whole sequences.

    Args:
        config: The model's configuration.
        adapter: What holds the prefixes.

    Raises:
        UsageError: If a block that has one keeps no keys and values.
    """

    layers: list[Any]

    def __init__(self, config: PreTrainedConfig, adapter: Adapter) -> None:
        super().__init__(config=config)
        for index, layer in enumerate(self.layers):
            is_sliding = bool(getattr(layer, "is_sliding", False))
            one = adapter.blocks.get(index)
            if one is not None and one.prefix is not None:
                self.layers[index] = _PrefixLayer(one.prefix, is_sliding=is_sliding)
            else:
                self.layers[index] = AbsentLayer(is_sliding=is_sliding)
                self.layers[index].seen_tokens = adapter.prefix_tokens
        if max(adapter.blocks) >= len(self.layers):
            raise UsageError(f"block {max(adapter.blocks)} keeps no keys and values that a prefix could stand before")

    def has_previous_state(self, *args: Any, **kwargs: Any) -> bool:
        """Say that there is a past: the prefix."""
        return True

"""The per-session cache of the reference path: the family's own, holding only a span's blocks.

Knows transformers' cache layers. Knows no pages or leases: those belong to the packed path's store.
"""

# B batch, H heads, T new tokens, L stored tokens, D width of a head

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer, LinearAttentionCacheLayerMixin

from corolla.errors import UsageError
from corolla.terms import Span

__all__ = ["AbsentLayer", "SessionCache"]


class _WindowLayer(DynamicSlidingWindowLayer):  # type: ignore[misc]
    """A sliding window that keeps what slid out of it, so that a session can be rewound past the window's edge.

    It costs the memory of full attention, as does the packed path, which keeps all tokens too.
    """

    keys: Any
    values: Any
    cumulative_length: int

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        count = key_states.shape[-2]
        self.cumulative_length += count
        self.keys = torch.cat((self.keys, key_states), dim=-2)
        self.values = torch.cat((self.values, value_states), dim=-2)
        visible = self.sliding_window - 1 + count
        return self.keys[:, :, -visible:], self.values[:, :, -visible:]

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove and self.is_initialized:
            self.keys = self.keys[:, :, : -abs(tokens_to_remove)]
            self.values = self.values[:, :, : -abs(tokens_to_remove)]
            self.cumulative_length = self.keys.shape[-2]


class AbsentLayer(CacheLayerMixin):  # type: ignore[misc]
    """In the place of a block that is not here: stores nothing, and answers for its kind as a block that is here would.

    Args:
        is_sliding: Whether the block sees a window only.
    """

    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, *, is_sliding: bool = False) -> None:
        super().__init__()
        self.is_sliding = is_sliding
        self.present: CacheLayerMixin | None = None
        self.seen_tokens = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is stored here."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refuse.

        Raises:
            AssertionError: Always: a block that is not here was run.
        """
        raise AssertionError("a block stores keys and values in a cache that has no room for it")

    def get_seq_length(self) -> int:
        """How many tokens the blocks that are here have stored."""
        return self.seen_tokens if self.present is None else int(self.present.get_seq_length())

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys a mask spans, and the position of the first."""
        if self.present is None:
            return self.seen_tokens + query_length, 0
        sizes: tuple[int, int] = self.present.get_mask_sizes(query_length)
        return sizes

    def get_max_length(self) -> int:
        """No bound."""
        return -1

    def get_max_cache_shape(self) -> int:
        """No bound."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Nothing is stored here."""

    def reset(self) -> None:
        """Nothing is stored here."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Nothing is stored here."""


class SessionCache(DynamicCache):  # type: ignore[misc]
    """The keys, values and states that the blocks of a span keep for one batch of sequences.

    Args:
        config: The model's configuration.
        span: The blocks that store here; the others have no room.
    """

    layers: list[Any]

    def __init__(self, config: PreTrainedConfig, span: Span) -> None:
        super().__init__(config=config)
        self.span = span
        self.seen_tokens = 0
        self._attentive: list[Any] = []  # those layers of the span that count tokens
        for index, layer in enumerate(self.layers):
            if type(layer) is DynamicSlidingWindowLayer:
                self.layers[index] = _WindowLayer(sliding_window=layer.sliding_window)
        self._keep_only(span)

    @property
    def can_rewind(self) -> bool:
        """Whether the session can be taken back to an earlier position; recurrent states cannot."""
        return not any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in self.layers)

    @property
    def size_bytes(self) -> int:
        """How much memory the stored tensors take."""
        return sum(_size_bytes(value) for layer in self.layers for value in vars(layer).values())

    def rewind(self, position: int) -> None:
        """Forget every token from ``position`` on.

        Raises:
            UsageError: If the position was not reached yet, or the family's states cannot go back.
        """
        if not 0 <= position <= self.seen_tokens:
            raise UsageError(f"cannot rewind to position {position}: the session is at {self.seen_tokens}")
        if position == self.seen_tokens:
            return
        if not self.can_rewind:
            raise UsageError("this model keeps recurrent states, which cannot be taken back: start the session anew")
        self.crop(position - self.seen_tokens)
        self._count_tokens(position)

    def add_tokens(self, count: int) -> None:
        """Note that a run has stored so many tokens in every block."""
        self._count_tokens(self.seen_tokens + count)

    def settle(self, blocks: Span) -> None:
        """Make ready for a run of some blocks; tokens that a failed run left half-way are dropped.

        Raises:
            UsageError: If the cache holds tokens of other blocks.
        """
        if blocks != self.span:
            if self.seen_tokens or not self.span.covers(blocks):
                raise UsageError(f"the session's cache is of blocks {self.span}, not {blocks}: open a session for each")
            self.span = blocks
            self._keep_only(blocks)
        for layer in self._attentive:
            if (extra := layer.get_seq_length() - self.seen_tokens) > 0:
                layer.crop(-extra)

    def begin_with(self, blocks: Span, prefixes: Mapping[int, tuple[Tensor, Tensor]]) -> None:
        """Store keys and values before the first token.

        Args:
            blocks: The blocks that the cache is for.
            prefixes: For each of them, keys and values ``[H, L, D]``.
        """
        self.settle(blocks)
        for block, (keys_HLD, values_HLD) in prefixes.items():
            self.layers[block].update(keys_HLD[None], values_HLD[None])
        self.add_tokens(prefixes[blocks.start][0].shape[1])

    def copy(self, rows_B: Tensor | None = None) -> "SessionCache":
        """Copy the cache, or build one from some of its rows: what beam search needs when it reorders its beams.

        Args:
            rows_B: Indices of rows, in the order wanted, int64; a row may occur several times. ``None`` for all.
        """
        twin = copy.deepcopy(self)
        if rows_B is not None:
            twin.reorder_cache(rows_B)
        return twin

    def has_previous_state(self, *args: Any, **kwargs: Any) -> bool:
        """See :meth:`transformers.Cache.has_previous_state`; a span without recurrent blocks counts by itself."""
        if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in self.layers):
            return bool(super().has_previous_state(*args, **kwargs))
        return self.seen_tokens > 0

    def _count_tokens(self, seen_tokens: int) -> None:
        self.seen_tokens = seen_tokens
        for layer in self.layers:
            if isinstance(layer, AbsentLayer):
                layer.seen_tokens = seen_tokens

    def _keep_only(self, span: Span) -> None:
        for index, layer in enumerate(self.layers):
            if index not in span and not isinstance(layer, AbsentLayer):
                self.layers[index] = AbsentLayer(is_sliding=getattr(layer, "is_sliding", False))
        self._attentive = [
            layer for layer in self.layers if isinstance(layer, CacheLayerMixin) and not isinstance(layer, AbsentLayer)
        ]
        for layer in self.layers:
            if isinstance(layer, AbsentLayer):
                alike = [present for present in self._attentive if present.is_sliding == layer.is_sliding]
                layer.present = next(iter(alike or self._attentive), None)


def _size_bytes(value: object) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(_size_bytes(part) for part in value.values())
    return 0

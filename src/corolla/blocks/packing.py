"""The packed path's attention: tokens of many independent sequences on one axis, each row attending to its own past.

Registered with transformers under one name, so that every family that asks for attention by name runs on it. Knows rows
and their stores; not blocks, spans or sessions.
"""

# N packed tokens, H query heads, K key heads, T tokens of a row, L stored tokens, D head width

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, Cache, PreTrainedConfig

from corolla.blocks.kv import PackedRow
from corolla.blocks.session_cache import AbsentLayer
from corolla.errors import UnsupportedModel

__all__ = [
    "ATTENTION_NAME",
    "Attention",
    "PackedBatch",
    "PassingCache",
    "attend",
    "attend_pieces",
    "register_attention",
    "run_batch",
    "seen",
]

ATTENTION_NAME = "corolla_packed"
"""The name of the packed attention in transformers' ``AttentionInterface``."""

Piece = tuple[Tensor, Tensor]
"""Keys and values ``[K, L, D]`` of consecutive tokens."""

_FEW_TOKENS = 16
"""So few new tokens attend to pieces one by one; for more, joining these costs little beside the rest."""

_NOT_HONOURED = ("block_indices", "indices", "position_bias", "sinks")


class _Reach(NamedTuple):
    """How far back a block sees: all tokens, the last ``window`` of them, or those of the same chunk."""

    window: int | None = None
    chunk: int | None = None

    @property
    def tokens(self) -> int | None:
        """The most tokens that it sees; ``None`` for all."""
        return self.window or self.chunk

    def first_seen(self, position: int) -> int:
        """The earliest position that a token at ``position`` attends to."""
        if self.window is not None:
            return max(0, position - self.window + 1)
        return position // self.chunk * self.chunk if self.chunk is not None else 0


class Attention(NamedTuple):
    """How a block attends.

    Args:
        block: Its index in the whole model.
        reach: How far back it sees.
        scaling: What scores are multiplied by; ``None`` for one over the root of the head's width.
        softcap: What scores are capped at, smoothly; ``None`` for no cap.
        sinks_H: For each query head, the score of attending to nothing; ``None`` if that is not possible.
    """

    block: int
    reach: _Reach
    scaling: float | None
    softcap: float | None
    sinks_H: Tensor | None

    @property
    def is_plain(self) -> bool:
        """Whether it is a softmax of scores and nothing else."""
        return self.softcap is None and self.sinks_H is None


@dataclass(slots=True)
class PackedBatch:
    """The rows of one packed run, and what its blocks share.

    Args:
        rows: The rows, in the order of their tokens.
        visited: How each block that has attended so far did it.
    """

    rows: Sequence[PackedRow]
    visited: dict[int, Attention] = field(default_factory=dict)
    _new: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _masks: dict[tuple[int, _Reach, int], Tensor] = field(default_factory=dict)

    def put_new(self, block: int, key_1KND: Tensor, value_1KND: Tensor) -> None:
        """Note what a block wants stored for the new tokens of all rows."""
        self._new[block] = (key_1KND, value_1KND)

    def take_new(self, block: int) -> tuple[Tensor, Tensor]:
        """What :meth:`put_new` noted.

        Raises:
            UnsupportedModel: If the block wants nothing stored.
        """
        if block not in self._new:
            raise UnsupportedModel(f"block {block} attends without storing keys and values of its own")
        return self._new.pop(block)

    def mask_TL(self, index: int, reach: _Reach, groups: int, device: torch.device) -> Tensor:
        """Which of the tokens in reach each new token of a row attends to, bool, ``groups`` times over."""
        key = (index, reach, groups)
        if key not in self._masks:
            row = self.rows[index]
            query_T1 = torch.arange(row.start, row.start + row.count, device=device)[:, None]
            first = reach.first_seen(row.start)
            key_1L = torch.arange(first, row.start + row.count, device=device)[None, :]
            mask_TL = key_1L <= query_T1
            if reach.window is not None:
                mask_TL &= key_1L > query_T1 - reach.window
            elif reach.chunk is not None:
                mask_TL &= key_1L // reach.chunk == query_T1 // reach.chunk
            self._masks[key] = mask_TL.repeat(groups, 1)
        return self._masks[key]


_RUNNING: ContextVar[PackedBatch] = ContextVar("corolla_packed_batch")


@contextmanager
def run_batch(batch: PackedBatch) -> Iterator[None]:
    """Make a batch the one that the packed attention serves, for as long as the context lasts."""
    token = _RUNNING.set(batch)
    try:
        yield
    finally:
        _RUNNING.reset(token)


def register_attention() -> None:
    """Tell transformers about the packed attention; doing it again changes nothing."""
    AttentionInterface.register(ATTENTION_NAME, _attend)


class PassingCache(Cache):  # type: ignore[misc]
    """What the blocks take for their cache: hands the new keys and values on to the attention, which stores them.

    Args:
        count: How many blocks the whole model has.
        batch: The running batch.
    """

    def __init__(self, count: int, batch: PackedBatch) -> None:
        super().__init__(layers=[AbsentLayer() for _ in range(count)])
        self._batch = batch

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Hand back the new keys and values, and remember them as what is to be stored."""
        self._batch.put_new(layer_idx, key_states, value_states)
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Nothing is stored here."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Masks are the attention's own work; none is to be made from this."""
        return query_length, 0


def _attend(
    module: Any,
    query_1HND: Tensor,
    key_1KND: Tensor,
    value_1KND: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it; the rows come from the running batch."""
    batch, block = _RUNNING.get(), module.layer_idx
    _check_options(block, attention_mask, options)
    reach, get = _reach(module.config, block, options), options.get
    batch.visited[block] = Attention(block, reach, get("scaling"), get("softcap"), get("s_aux"))
    new_key, new_value = batch.take_new(block)
    # Multi-head latent attention stores compressed keys and values, and expands them to attend.
    expand = None if new_key.shape == key_1KND.shape else getattr(module, "expand_kv", _refuse_expansion)
    return attend(batch, batch.visited[block], query_1HND[0], new_key[0], new_value[0], expand)[None], None


def attend(
    batch: PackedBatch,
    attention: Attention,
    query_HND: Tensor,
    key_KND: Tensor,
    value_KND: Tensor,
    expand: Callable[..., Any] | None = None,
) -> Tensor:
    """Store the new tokens' keys and values in their rows, and let each token attend to its own row.

    Args:
        batch: The rows.
        attention: How to attend.
        query_HND: The queries of the new tokens of all rows.
        key_KND: Their keys, as they are to be stored.
        value_KND: Their values.
        expand: What makes stored keys and values those to attend to; ``None`` if they are.

    Returns:
        What was attended to, ``[N, H, D]``.
    """
    counts = [row.count for row in batch.rows]
    parts = zip(*(tensor.split(counts, dim=1) for tensor in (query_HND, key_KND, value_KND)), strict=True)
    outputs_THD = []
    for index, (row, (query_HTD, key_KTD, value_KTD)) in enumerate(zip(batch.rows, parts, strict=True)):
        pieces = seen(row, attention, row.kv.append(attention.block, key_KTD, value_KTD))
        if len(pieces) > 1 and (expand is not None or not _can_be_in_pieces(row, attention.reach)):
            pieces = (_joined(pieces),)
        if expand is not None:
            ((key_KLD, value_KLD),) = pieces
            expanded = expand(key_KLD[None], value_KLD[None])
            pieces = ((expanded[0][0], expanded[1][0]),)
        outputs_THD.append(attend_pieces(batch, index, attention, query_HTD, pieces))
    return outputs_THD[0] if len(outputs_THD) == 1 else torch.cat(outputs_THD)


def seen(row: PackedRow, attention: Attention, pieces: Sequence[Piece]) -> Sequence[Piece]:
    """Leave out what none of a row's new tokens sees."""
    first = attention.reach.first_seen(row.start)
    return _last(pieces, row.start + row.count - first) if first else pieces


def _can_be_in_pieces(row: PackedRow, reach: _Reach) -> bool:
    """Say whether a row's tokens can attend to pieces one by one: all of them see all but the last."""
    return row.count == 1 or (row.count <= _FEW_TOKENS and reach == _Reach())


def _last(pieces: Sequence[Piece], tokens: int) -> tuple[Piece, ...]:
    """Take so many tokens from the end."""
    kept: list[Piece] = []
    for key_KLD, value_KLD in reversed(pieces):
        if tokens > 0:
            kept.append((key_KLD[:, -tokens:], value_KLD[:, -tokens:]))
        tokens -= key_KLD.shape[1]
    return tuple(reversed(kept))


def _joined(pieces: Sequence[Piece]) -> Piece:
    keys, values = zip(*pieces, strict=True)
    return torch.cat(keys, 1), torch.cat(values, 1)


def _refuse_expansion(*_: Tensor) -> Any:
    raise UnsupportedModel("keys and values are rearranged after they were stored, in a way that rows cannot repeat")


class _RowView(NamedTuple):
    """One row's new queries, and the keys and values that they may see."""

    batch: PackedBatch
    row_index: int
    reach: _Reach
    query_HTD: Tensor
    pieces: Sequence[Piece]

    @property
    def folded_KTD(self) -> Tensor:
        """The queries that share a key head, one after the other: so keys and values need no copies for them."""
        return self.query_HTD.reshape(self.pieces[-1][0].shape[0], -1, self.query_HTD.shape[2])

    @property
    def groups(self) -> int:
        return self.query_HTD.shape[0] // self.pieces[-1][0].shape[0]

    def mask_TL(self) -> Tensor | None:
        """Which keys the folded queries may see; ``None`` for all."""
        if self.batch.rows[self.row_index].count == 1:
            return None
        return self.batch.mask_TL(self.row_index, self.reach, self.groups, self.query_HTD.device)

    def is_prompt(self) -> bool:
        """Whether the row is a whole prompt, within reach of its last token: the mask that kernels know as causal."""
        row = self.batch.rows[self.row_index]
        return row.start == 0 and row.count > 1 and self.reach.first_seen(row.count - 1) == 0


def attend_pieces(
    batch: PackedBatch, index: int, attention: Attention, query_HTD: Tensor, pieces: Sequence[Piece]
) -> Tensor:
    """Let the new tokens of one row attend to pieces of its keys and values.

    Returns:
        What was attended to, ``[T, H, D]``.
    """
    view = _RowView(batch, index, attention.reach, query_HTD, pieces)
    if not attention.is_plain:
        return _attend_by_scores(view, attention)
    if len(view.pieces) == 1:
        return _attend_fused(view, attention.scaling)
    key_KLD, value_KLD = view.pieces[-1]
    has_kernel = key_KLD.device.type == "cpu" and key_KLD.shape[2] == value_KLD.shape[2]
    return _attend_in_turn(view, attention) if has_kernel else _attend_by_scores(view, attention)


def _attend_fused(view: _RowView, scaling: float | None) -> Tensor:
    ((key_KLD, value_KLD),) = view.pieces
    if view.is_prompt():
        output_1HTD = scaled_dot_product_attention(
            view.query_HTD[None],
            key_KLD[None],
            value_KLD[None],
            is_causal=True,
            scale=scaling,
            enable_gqa=view.groups > 1,
        )
        return output_1HTD[0].transpose(0, 1)
    output_1KTD = scaled_dot_product_attention(
        view.folded_KTD[None], key_KLD[None], value_KLD[None], attn_mask=view.mask_TL(), scale=scaling
    )
    return _unfold(output_1KTD[0], view)


def _attend_in_turn(view: _RowView, attention: Attention) -> Tensor:
    """Attend to each piece by itself, and weigh what comes of them by how much of all attention each would have had.

    That is the sum of exponentials that the kernel of a CPU gives besides its output (arXiv 2205.14135, section 3.1).
    """
    query_1KTD, mask_TL = view.folded_KTD[None], view.mask_TL()
    outputs_KTD, sums_KT = [], []
    for key_KLD, value_KLD in view.pieces:
        seen = None if mask_TL is None or key_KLD is not view.pieces[-1][0] else mask_TL[:, -key_KLD.shape[1] :]
        bias = None if seen is None else torch.zeros_like(seen, dtype=query_1KTD.dtype).masked_fill_(~seen, -torch.inf)
        output_1KTD, sum_1KT = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query_1KTD, key_KLD[None], value_KLD[None], attn_mask=bias, scale=attention.scaling
        )
        outputs_KTD.append(output_1KTD[0])
        sums_KT.append(sum_1KT[0])
    weights_PKT1 = torch.softmax(torch.stack(sums_KT), dim=0)[..., None]
    output_KTD = (torch.stack(outputs_KTD) * weights_PKT1).sum(0)
    return _unfold(output_KTD.to(query_1KTD.dtype), view)


def _attend_by_scores(view: _RowView, attention: Attention) -> Tensor:
    # Capped scores and attention sinks: no fused kernel of torch has them.
    query_KTD, softcap, sinks_H = view.folded_KTD, attention.softcap, attention.sinks_H
    scores = [query_KTD @ key_KLD.transpose(1, 2) for key_KLD, _ in view.pieces]
    scores_KTL = scores[0] if len(scores) == 1 else torch.cat(scores, dim=-1)
    scores_KTL *= attention.scaling or 1 / math.sqrt(query_KTD.shape[2])
    if softcap is not None:
        scores_KTL = torch.tanh(scores_KTL / softcap) * softcap
    mask_TL = view.mask_TL()
    if mask_TL is not None:
        scores_KTL = scores_KTL.masked_fill(~mask_TL, -torch.inf)
    if sinks_H is not None:
        sinks_KT1 = sinks_H.reshape(scores_KTL.shape[0], -1, 1).repeat_interleave(view.query_HTD.shape[1], dim=1)
        scores_KTL = torch.cat((scores_KTL, sinks_KT1.to(scores_KTL.dtype)), dim=-1)
    weights_KTL = torch.softmax(scores_KTL, dim=-1, dtype=torch.float32).to(query_KTD.dtype)
    outputs, offset = [], 0
    for _, value_KLD in view.pieces:
        outputs.append(weights_KTL[..., offset : offset + value_KLD.shape[1]] @ value_KLD)
        offset += value_KLD.shape[1]
    return _unfold(outputs[0] if len(outputs) == 1 else torch.stack(outputs).sum(0), view)


def _unfold(output_KTD: Tensor, view: _RowView) -> Tensor:
    return output_KTD.reshape(view.query_HTD.shape[0], view.query_HTD.shape[1], -1).transpose(0, 1)


def _check_options(block: int, attention_mask: Tensor | None, options: dict[str, Any]) -> None:
    unknown = [name for name in _NOT_HONOURED if options.get(name) is not None]
    if attention_mask is not None:
        unknown.append("attention_mask")
    if options.get("is_causal") is False:
        unknown.append("is_causal")
    if unknown:
        raise UnsupportedModel(f"block {block} asks its attention for {', '.join(unknown)}, which rows cannot have")


def _reach(config: PreTrainedConfig, block: int, options: dict[str, Any]) -> _Reach:
    kinds = getattr(config, "layer_types", None)
    kind = kinds[block] if kinds else None
    if kind == "chunked_attention":
        return _Reach(chunk=config.attention_chunk_size)
    if "sliding_window" in options:
        return _Reach(window=options["sliding_window"])
    return _Reach(window=getattr(config, "sliding_window", None) if kind in (None, "sliding_attention") else None)

"""The blocks of a span, ready to run: the exact path with the family's own cache, and the packed path over rows.

Owns the weights of the blocks. Knows no files, sessions, pages, queues or peers.
"""

# B batch, T tokens, D model width, N packed tokens

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from corolla.blocks.adapters import Adapter, Addition, Alone, BlockAdapter, RowAdapters, adding, check_fits
from corolla.blocks.architecture import hidden_size, num_blocks, stretched_ropes, text_config
from corolla.blocks.fused import FusedBlock, Scratch
from corolla.blocks.graphs import GraphBudget
from corolla.blocks.kv import GrowingKV, KVShape, PackedRow
from corolla.blocks.lean import LeanBlock, Rotation
from corolla.blocks.packing import ATTENTION_NAME, Attention, PackedBatch, PassingCache, register_attention, run_batch
from corolla.blocks.prefix import PrefixCache
from corolla.blocks.products import FrozenLayer, has_kernels
from corolla.blocks.session_cache import SessionCache
from corolla.blocks.shell import BlockCall, Shell
from corolla.errors import UnsupportedModel, UsageError
from corolla.terms import Span

__all__ = ["BlockSpan"]


class BlockSpan(nn.Module):
    """Some consecutive blocks of a model, frozen.

    Each run first lets transformers' own base model prepare what its blocks need (see ``blocks/shell.py``), then calls
    the blocks one after the other. Not for several threads at once.

    Args:
        model: A pruned model that holds the weights of the span; it is taken over.
        span: The blocks that it still has.
        is_packable: Whether the family's self-test passed on the packed path.
        is_lean: Whether it passed with lean blocks as well (``blocks/lean.py``).
        dtype: The number format of the hidden states; ``None`` for that of the first weight.

    Attributes:
        span: The blocks that are here.
        blocks: The blocks themselves, the first of the span first.
        config: The configuration of the whole model.
        can_rewind: Whether a session can be taken back to an earlier position.
        graph_bytes: How much a run with gradients may keep of what its blocks compute, for the way back. Blocks beyond
            that keep their inputs alone and compute the rest again: a third more work, with a small part of the memory.

    Raises:
        UnsupportedModel: If the family's base model cannot be recorded.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        span: Span,
        *,
        is_packable: bool = False,
        is_lean: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.span = span
        self.config: PreTrainedConfig = model.config
        self.is_packable = is_packable
        self.graph_bytes = 0
        self.dtype: torch.dtype = dtype or model.dtype
        self._shell = Shell(model, span, self.dtype)
        self._base = self._shell.decoder  # registered, so that its buffers move along with the blocks
        self.blocks = self._shell.blocks
        self._attention_configs = _attention_configs(self._shell.decoder, self.blocks)
        self._stretched = stretched_ropes(text_config(self.config))
        self.can_rewind = self.new_cache().can_rewind
        self.eval().requires_grad_(False)
        register_attention()
        self._lean: Sequence[LeanBlock | FusedBlock] = ()
        self._adapter: Adapter | None = None
        if is_lean:
            self.make_lean()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.blocks.parameters()).device

    @property
    def hidden_size(self) -> int:
        """The width of the hidden states."""
        return hidden_size(self.config)

    @property
    def is_chunkable(self) -> bool:
        """Whether a prompt may come in chunks and give what it gives at once; rotary tables that stretch forbid it."""
        return not self._stretched

    @property
    def takes_positions(self) -> bool:
        """Whether the family makes use of positions, or finds them out by itself."""
        return self._shell.takes_positions

    @property
    def weight_bytes(self) -> int:
        """How much memory the blocks' weights take."""
        listed_bytes = sum(tensor.nbytes for tensor in (*self.blocks.parameters(), *self.blocks.buffers()))
        return listed_bytes + sum(
            part.unlisted_bytes for part in self.blocks.modules() if isinstance(part, FrozenLayer)
        )

    @property
    def can_be_lean(self) -> bool:
        """Whether all blocks have the parts of lean ones; whether they give the same is for the self-test to find."""
        return all(LeanBlock.fits(block) for block in self.blocks)

    @cached_property
    def kv_shapes(self) -> dict[int, KVShape]:
        """What each block stores of a token, for those that have keys and values; the first time, it is tried out."""
        cache = self.new_cache()
        probe_BTD = torch.zeros(1, 1, self.hidden_size, dtype=self.dtype, device=self.device)
        with torch.inference_mode():
            self.forward(probe_BTD, cache=cache)
        stored = {
            index: (getattr(cache.layers[index], "keys", None), getattr(cache.layers[index], "values", None))
            for index in range(self.span.start, min(self.span.stop, len(cache.layers)))
        }
        return {
            index: KVShape(keys.shape[1], keys.shape[3], values.shape[3])
            for index, (keys, values) in stored.items()
            if isinstance(keys, Tensor) and isinstance(values, Tensor) and keys.dim() == values.dim() == 4
        }

    @cached_property
    def windows(self) -> dict[int, int]:
        """How many tokens each block sees that does not see all of a row; only of packable families."""
        seen = self._attention if self.is_packable else {}
        reaches = {index: attention.reach.tokens for index, attention in seen.items()}
        return {index: tokens for index, tokens in reaches.items() if tokens is not None}

    @cached_property
    def _attention(self) -> dict[int, Attention]:
        """How each block attends; the first time, a token is sent through them to see it."""
        batch = PackedBatch([PackedRow(0, 1, GrowingKV())])
        probe_ND = torch.zeros(1, self.hidden_size, dtype=self.dtype, device=self.device)
        with torch.inference_mode():
            self._run_blocks(probe_ND, self.span, batch, ())
        return batch.visited

    def check_adapter(self, index: int, adapter: BlockAdapter) -> None:
        """Refuse what cannot be added to a block.

        Args:
            index: Which block of the span.
            adapter: What is to be added.

        Raises:
            UsageError: If its layers or shapes are not those of the block.
        """
        check_fits(adapter, index, self.blocks[index - self.span.start], self.kv_shapes.get(index))

    @contextmanager
    def adapted(self, adapter: Adapter | None) -> Iterator[None]:
        """Let :meth:`forward` run with an adapter, and the way back as well, for as long as the context lasts.

        Args:
            adapter: Of blocks of the span; ``None`` for none.
        """
        blocks = dict(zip(self.span.indices, self.blocks, strict=True))
        self._adapter = adapter
        try:
            with adding(blocks, None if adapter is None else Alone(adapter)):
                yield
        finally:
            self._adapter = None

    def make_lean(self) -> None:
        """Run packed tokens through lean blocks from now on; :meth:`forward` stays as it is.

        A token is sent through the blocks once, to see how each of them attends.
        """
        attention = [self._attention[index] for index in self.span.indices]
        blocks = list(zip(self.blocks, attention, strict=True))
        forms = {FusedBlock.form_of(block) for block in self.blocks} if has_kernels(self.dtype, self.device) else set()
        form = forms.pop() if len(forms) == 1 else None
        if form is not None:
            scratch = Scratch(self.dtype, form)
            self._lean = [FusedBlock(block, reach, scratch) for block, reach in blocks]
        else:
            self._lean = [LeanBlock(block, reach) for block, reach in blocks]

    def new_cache(self) -> SessionCache:
        """An empty cache for one session on the exact path."""
        return SessionCache(self.config, self.span)

    def forward(
        self,
        hidden_BTD: Tensor,
        *,
        attention_mask_BT: Tensor | None = None,
        position_ids_BT: Tensor | None = None,
        cache: Cache | None = None,
        blocks: Span | None = None,
        taps: Collection[int] = (),
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Run hidden states through blocks, bit for bit as transformers would; differentiable in ``hidden_BTD``.

        Args:
            hidden_BTD: What enters the first block, in the span's dtype.
            attention_mask_BT: 1 for tokens, 0 for padding, over stored and new tokens; ``None`` for no padding.
            position_ids_BT: Each new token's position, int64; ``None`` to count on from the cache.
            cache: What earlier runs of these sequences stored and this one adds to; ``None`` to store nothing. A cache
                serves the same ``blocks`` for as long as it holds tokens.
            blocks: Which blocks of the span to run; ``None`` for all.
            taps: Blocks whose outputs are wanted as well.

        Returns:
            The output of the last block, and that of every tapped one by its index.

        Raises:
            UsageError: If the blocks are not in the span, or the cache belongs to other blocks.
        """
        part = self._part(blocks)
        if isinstance(cache, SessionCache):
            cache.settle(part)
        elif self._adapter is not None and (prefix_tokens := self._adapter.prefix_tokens):
            cache = PrefixCache(self.config, self._adapter.part(part))
            if attention_mask_BT is not None:
                attention_mask_BT = pad(attention_mask_BT, (prefix_tokens, 0), value=1)
        calls = self._shell.record(
            hidden_BTD, part, attention_mask_BT=attention_mask_BT, position_ids_BT=position_ids_BT, cache=cache
        )
        is_repeatable = cache is None or isinstance(cache, PrefixCache)
        budget = None
        if is_repeatable and torch.is_grad_enabled():
            budget = GraphBudget(self.graph_bytes, (*self.blocks.parameters(), *self.blocks.buffers()))
        output_BTD, tapped = self._run(hidden_BTD, part, calls, taps, budget)
        if isinstance(cache, SessionCache):
            cache.add_tokens(hidden_BTD.shape[1])
        return output_BTD, tapped

    def forward_packed(
        self,
        hidden_ND: Tensor,
        rows: Sequence[PackedRow],
        *,
        blocks: Span | None = None,
        taps: Collection[int] = (),
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Run tokens of many independent sequences through blocks at once, without padding.

        Agrees with :meth:`forward` up to rounding: only the attention kernels differ.

        Args:
            hidden_ND: The new tokens of all rows, row after row, in the span's dtype.
            rows: How many tokens each row has and gets, and where it stores keys and values.
            blocks: Which blocks of the span to run; ``None`` for all.
            taps: Blocks whose outputs are wanted as well.

        Returns:
            The output of the last block, and that of every tapped one by its index, in the order of ``hidden_ND``.

        Raises:
            UsageError: If the blocks are not in the span, or the rows do not add up to the tokens.
            UnsupportedModel: If a block does something that rows cannot have; a family's self-test finds out before.
        """
        part = self._part(blocks)
        total = sum(row.count for row in rows)
        if total != hidden_ND.shape[0] or any(row.count < 1 or row.start < 0 for row in rows):
            raise UsageError(f"the rows have {total} new tokens, but {hidden_ND.shape[0]} hidden states came")
        kinds = [self._rope_kind(row) for row in rows]
        if len(set(kinds)) <= 1:
            return self._run_packed(hidden_ND, rows, part, taps)
        return self._run_by_kind(hidden_ND, rows, kinds, part, taps)

    def _part(self, blocks: Span | None) -> Span:
        if blocks is None:
            return self.span
        if not self.span.covers(blocks):
            raise UsageError(f"blocks {blocks} are not here: this span has {self.span}")
        return blocks

    def _run(
        self,
        hidden: Tensor,
        part: Span,
        calls: list[BlockCall],
        taps: Collection[int],
        budget: GraphBudget | None = None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        tapped: dict[int, Tensor] = {}
        for index, call in zip(part.indices, calls, strict=True):
            block = self.blocks[index - self.span.start]
            run = block if budget is None else partial(budget.run, block)
            output = run(hidden, *call.args, **call.kwargs)
            hidden = output if isinstance(output, Tensor) else output[0]
            if index in taps:
                tapped[index] = hidden
        return hidden, tapped

    def _run_packed(
        self, hidden_ND: Tensor, rows: Sequence[PackedRow], part: Span, taps: Collection[int]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        batch = PackedBatch(rows)
        adapters, counts = [row.adapter for row in rows], [row.count for row in rows]
        addition = RowAdapters.of(adapters, counts, hidden_ND.device)
        if self._lean:
            return self._run_lean(hidden_ND, part, batch, taps, addition)
        with adding({index: self.blocks[index - self.span.start] for index in part.indices}, addition):
            result = self._run_blocks(hidden_ND, part, batch, taps)
        if len(batch.visited) != len(part):
            raise UnsupportedModel(f"{self.config.model_type} attends in a way of its own, which rows cannot have")
        return result

    def _run_blocks(
        self, hidden_ND: Tensor, part: Span, batch: PackedBatch, taps: Collection[int]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Run packed tokens through transformers' own blocks."""
        with self._packed_attention(), run_batch(batch):
            calls = self._record_packed(hidden_ND, part, batch)
            output_1ND, tapped = self._run(hidden_ND[None], part, calls, taps)
        return output_1ND[0], {index: tensor_1ND[0] for index, tensor_1ND in tapped.items()}

    def _run_lean(
        self, hidden_ND: Tensor, part: Span, batch: PackedBatch, taps: Collection[int], addition: Addition | None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Run packed tokens through lean blocks."""
        with self._packed_attention():
            calls = self._record_packed(hidden_ND, part, batch)
        tapped: dict[int, Tensor] = {}
        rotations: dict[int, Rotation] = {}  # most families have one table for all blocks
        for index, call in zip(part.indices, calls, strict=True):
            table = call.kwargs["position_embeddings"]
            if id(table) not in rotations:
                rotations[id(table)] = Rotation(*table)
            hidden_ND = self._lean[index - self.span.start].run(hidden_ND, rotations[id(table)], batch, addition)
            if index in taps:
                tapped[index] = hidden_ND
        return hidden_ND, tapped

    def _record_packed(self, hidden_ND: Tensor, part: Span, batch: PackedBatch) -> list[BlockCall]:
        positions = [position for row in batch.rows for position in range(row.start, row.start + row.count)]
        return self._shell.record(
            hidden_ND[None],
            part,
            attention_mask_BT=None,
            position_ids_BT=torch.tensor([positions], device=hidden_ND.device),
            cache=PassingCache(num_blocks(self.config), batch),
        )

    def _run_by_kind(
        self,
        hidden_ND: Tensor,
        rows: Sequence[PackedRow],
        kinds: list[tuple[int, ...]],
        part: Span,
        taps: Collection[int],
    ) -> tuple[Tensor, dict[int, Tensor]]:
        pieces = hidden_ND.split([row.count for row in rows])
        outputs: dict[int, tuple[Tensor, dict[int, Tensor]]] = {}
        for kind in set(kinds):
            members = [index for index, found in enumerate(kinds) if found == kind]
            chosen = [rows[index] for index in members]
            output_ND, tapped = self._run_packed(torch.cat([pieces[index] for index in members]), chosen, part, taps)
            counts = [row.count for row in chosen]
            split = {tap: tensor_ND.split(counts) for tap, tensor_ND in tapped.items()}
            for place, (index, piece) in enumerate(zip(members, output_ND.split(counts), strict=True)):
                outputs[index] = (piece, {tap: parts[place] for tap, parts in split.items()})
        ordered = [outputs[index] for index in range(len(rows))]
        joined = {tap: torch.cat([tapped[tap] for _, tapped in ordered]) for tap in ordered[0][1]}
        return torch.cat([piece for piece, _ in ordered]), joined

    def _rope_kind(self, row: PackedRow) -> tuple[int, ...]:
        # Rotary tables that stretch with the length of a sequence are one for a whole run: only rows that need the same
        # table may share one.
        stop = row.start + row.count
        return tuple(0 if stop <= tokens else stop if is_gradual else 1 for tokens, is_gradual in self._stretched)

    @contextmanager
    def _packed_attention(self) -> Iterator[None]:
        usual = [config._attn_implementation_internal for config in self._attention_configs]
        for config in self._attention_configs:
            config._attn_implementation_internal = ATTENTION_NAME
        try:
            yield
        finally:
            for config, name in zip(self._attention_configs, usual, strict=True):
                config._attn_implementation_internal = name


def _attention_configs(*modules: nn.Module) -> list[Any]:
    """Every configuration object that some module reads its kind of attention from."""
    found = {
        id(config): config for top in modules for part in top.modules() if (config := getattr(part, "config", None))
    }
    return [config for config in found.values() if hasattr(config, "_attn_implementation_internal")]

"""The shell: transformers' own base model with recorders where its blocks were.

Running the shell lets transformers prepare masks, rotary tables and positions in its own way for every block; the
recorders write down what each block would have been called with. Knows nothing of how the blocks are then run.
"""

# B batch, T tokens, D model width

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from corolla.blocks.architecture import blocks_of, hidden_size
from corolla.errors import UnsupportedModel
from corolla.terms import Span

__all__ = ["BlockCall", "Shell", "StandIns", "find_arity", "plain_attributes", "prune"]


@dataclass(frozen=True, slots=True)
class BlockCall:
    """What a block is called with, apart from the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Finished(Exception):
    """The last block of interest was reached."""


@dataclass(slots=True)
class _Tape:
    """What the recorders of one shell share: what to record, and how their family's blocks return."""

    arity: int = 0  # 0: blocks return a tensor; n: a tuple of n whose first is the tensor
    first: int = 0
    last: int | None = None
    calls: list[BlockCall] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)

    def reset(self, first: int, last: int | None) -> None:
        self.first, self.last, self.calls, self.shapes = first, last, [], []

    def take(self) -> list[BlockCall]:
        calls, self.calls = self.calls, []
        return calls


class _Recorder(nn.Module):
    """Stands in a block's place, writes down its arguments and passes the hidden states on."""

    def __init__(self, block: nn.Module, index: int, tape: _Tape) -> None:
        super().__init__()
        self.__dict__.update(plain_attributes(block))
        self._index = index
        self._tape = tape

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden_BTD = args[0] if args else kwargs.pop("hidden_states")
        tape = self._tape
        if self._index >= tape.first:
            tape.calls.append(BlockCall(args[1:], kwargs))
            tape.shapes.append(tuple(getattr(hidden_BTD, "shape", ())))
        if self._index == tape.last:
            raise _Finished
        return (hidden_BTD, *[None] * (tape.arity - 1)) if tape.arity else hidden_BTD


def plain_attributes(block: nn.Module) -> dict[str, Any]:
    """The attributes of a block that are neither modules nor tensors: its base model may read them."""
    return {name: value for name, value in vars(block).items() if not name.startswith("_") and name != "training"}


class _Zero(nn.Module):
    """In place of an embedding: adds nothing, whatever is looked up."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros(())  # a scalar takes part in sums of any dtype, on any device


class _Same(nn.Module):
    """In place of any other module with parameters: passes its first argument on."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if args else next(iter(kwargs.values()))


class StandIns(nn.ModuleList):
    """A list of modules in place of blocks; base models slice it in every run, which would make a module each time."""

    def __getitem__(self, index: Any) -> Any:
        """Give a module, or a plain list of some."""
        return list(self._modules.values())[index] if isinstance(index, slice) else super().__getitem__(index)


def prune(model: PreTrainedModel, span: Span) -> None:
    """Leave only a span's blocks with parameters; all else becomes stubs.

    Args:
        model: A model with all its blocks, best without storage (on the meta device); it is changed in place.
        span: The blocks to keep.

    Raises:
        UnsupportedModel: If the model does not keep its blocks in one list.
    """
    decoder, name = blocks_of(model)
    blocks: Any = getattr(decoder, name)
    _stub(model, keep=blocks)
    for index in range(len(blocks)):
        if index not in span:
            stub = _Same()
            stub.__dict__.update(plain_attributes(blocks[index]))
            blocks[index] = stub


def _stub(module: nn.Module, keep: nn.Module) -> None:
    for name, child in module.named_children():
        if child is keep:
            continue
        if any(part is keep for part in child.modules()):
            _stub(child, keep)
        elif next(child.parameters(), None) is not None:
            setattr(module, name, _Zero() if isinstance(child, nn.Embedding) else _Same())


class Shell:
    """Records what transformers would call each block of a span with.

    Not for several threads at once: its recorders share one tape.

    Args:
        model: A pruned model; its blocks of the span are taken out of it.
        span: The blocks that it still has.
        dtype: The number format of the hidden states.

    Raises:
        UnsupportedModel: If the base model treats its blocks in a way that cannot be recorded.
    """

    def __init__(self, model: PreTrainedModel, span: Span, dtype: torch.dtype) -> None:
        self.decoder, name = blocks_of(model)
        listed: Any = StandIns(getattr(self.decoder, name))
        self.blocks = nn.ModuleList(listed[index] for index in span.indices)
        setattr(self.decoder, name, listed)
        device = next(self.blocks.parameters()).device
        self._tape = _Tape()
        _record_all(listed, self._tape)
        self._tape.arity = _learn_arity(self.decoder, self._tape, dtype, device)
        self.takes_positions = "position_ids" in inspect.signature(self.decoder.forward).parameters
        self._dynamic_rotaries = [module for module in self.decoder.modules() if _is_dynamic(module)]

    def record(
        self,
        hidden_BTD: Tensor,
        part: Span,
        *,
        attention_mask_BT: Tensor | None,
        position_ids_BT: Tensor | None,
        cache: Any,
    ) -> list[BlockCall]:
        """Run the shell and return what the blocks of ``part`` are to be called with, in order.

        Args:
            hidden_BTD: The hidden states that enter the first block; only their shape, dtype and device matter.
            part: Blocks of the span.
            attention_mask_BT: 1 for real tokens, 0 for padding, over all tokens so far; ``None`` for no padding.
            position_ids_BT: Where each token stands; ``None`` to count on from the cache.
            cache: The family's cache, or ``None`` to run without one.
        """
        tape = self._tape
        tape.reset(part.start, part.stop - 1)
        inputs: dict[str, Any] = {"inputs_embeds": hidden_BTD.detach(), "attention_mask": attention_mask_BT}
        if self.takes_positions:
            inputs["position_ids"] = position_ids_BT
        for rotary in self._dynamic_rotaries:
            _forget_length(rotary)
        try:
            with torch.no_grad():
                self.decoder(**inputs, past_key_values=cache, use_cache=cache is not None)
        except _Finished:
            return tape.take()
        raise AssertionError(f"{type(self.decoder).__name__} ended before it reached block {part.stop - 1}")


def find_arity(model: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> int:
    """How the blocks of a model return: 0 for a tensor, n for a tuple of n whose first is the tensor.

    Args:
        model: A model whose blocks may be anything; it is left as it was.
        dtype: The number format of the hidden states.
        device: Where the model is.

    Raises:
        UnsupportedModel: If neither works.
    """
    decoder, name = blocks_of(model)
    blocks: Any = getattr(decoder, name)
    stand_ins, tape = nn.ModuleList(blocks), _Tape()
    _record_all(stand_ins, tape)
    setattr(decoder, name, stand_ins)
    try:
        return _learn_arity(decoder, tape, dtype, device)
    finally:
        setattr(decoder, name, blocks)


def _record_all(blocks: Any, tape: _Tape) -> None:
    for index, block in enumerate(list(blocks)):
        blocks[index] = _Recorder(block, index, tape)


def _learn_arity(decoder: PreTrainedModel, tape: _Tape, dtype: torch.dtype, device: torch.device) -> int:
    # Only the base model knows what it expects of its blocks, so it is asked: with the wrong answer, the next block is
    # handed something that is no longer of the shape [B, T, D]. Three sequences, so that no two-tuple fits by accident.
    probe_BTD = torch.zeros(3, 2, hidden_size(decoder.config), dtype=dtype, device=device)
    reason: Exception | str = ""
    for tape.arity in (0, 1, 2, 3):
        tape.reset(0, None)
        try:
            with torch.no_grad():
                output = decoder(inputs_embeds=probe_BTD, use_cache=False)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            reason = error
            continue
        shapes = {*tape.shapes, tuple(output[0].shape)}
        tape.take()
        if shapes == {tuple(probe_BTD.shape)}:
            return tape.arity
        reason = f"hidden states of the shapes {sorted(shapes)}"
    raise UnsupportedModel(f"{type(decoder).__name__} does not treat its blocks as a plain chain: {reason}")


def _is_dynamic(module: nn.Module) -> bool:
    kinds: Any = getattr(module, "rope_type", None)
    return any("dynamic" in kind for kind in (kinds.values() if isinstance(kinds, dict) else [kinds or ""]))


def _forget_length(rotary: Any) -> None:
    # A dynamic rotary table keeps the longest sequence it has seen, so that one session would change another's results.
    # Starting from the original length each time gives every session what it would get alone.
    for prefix in [f"{kind}_" for kind in rotary.rope_type] if isinstance(rotary.rope_type, dict) else [""]:
        if getattr(rotary, f"{prefix}max_seq_len_cached", 0) > rotary.original_max_seq_len:
            rotary.register_buffer(f"{prefix}inv_freq", getattr(rotary, f"{prefix}original_inv_freq"), persistent=False)
            setattr(rotary, f"{prefix}max_seq_len_cached", rotary.original_max_seq_len)

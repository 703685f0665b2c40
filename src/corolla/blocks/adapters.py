"""Adapters: what is added to frozen blocks. LoRA pairs beside their linear layers, and a prefix before their tokens.

Knows tensors and layers; not who owns an adapter, how it came here, or where it is kept.
"""

# N tokens, R ranks, I inputs, O outputs, K key heads, P tokens of a prefix, W head width, ... any axes

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from corolla.blocks.kv import KVShape
from corolla.blocks.products import FrozenLayer
from corolla.errors import UsageError
from corolla.terms import Span

__all__ = [
    "Adapter",
    "Addition",
    "Alone",
    "BlockAdapter",
    "LoraPair",
    "Prefix",
    "RowAdapters",
    "adaptable_layers",
    "adding",
    "check_fits",
]


class LoraPair(NamedTuple):
    """What LoRA (arXiv 2106.09685) adds to a linear layer: ``scaling * up(down(input))``.

    Args:
        layer: The layer's name within its block, as ``self_attn.q_proj``.
        down_RI: From the layer's input to a few ranks.
        up_OR: From there to its output.
        scaling: By how much the product is multiplied.
    """

    layer: str
    down_RI: Tensor
    up_OR: Tensor
    scaling: float

    def add(self, input: Tensor, output: Tensor) -> Tensor:
        """Add the product to what the layer gives, in the very order of PEFT's own layer."""
        return output + linear(linear(input.to(self.down_RI.dtype), self.down_RI), self.up_OR) * self.scaling


class Prefix(NamedTuple):
    """Keys and values that stand before the first token of every sequence, as in prefix tuning (arXiv 2101.00190)."""

    key_KPW: Tensor
    value_KPW: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class BlockAdapter:
    """What is added to one block.

    Args:
        pairs: For layers; several may be for the same one.
        prefix: For its attention; ``None`` for none.
    """

    pairs: tuple[LoraPair, ...] = ()
    prefix: Prefix | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that it consists of, in a fixed order."""
        paired = tuple(tensor for pair in self.pairs for tensor in (pair.down_RI, pair.up_OR))
        return paired if self.prefix is None else (*paired, *self.prefix)

    @property
    def nbytes(self) -> int:
        """How much memory it takes."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def with_tensors(self, tensors: Sequence[Tensor]) -> "BlockAdapter":
        """Make one that differs in its tensors only.

        Args:
            tensors: As many as there are, in the order of :attr:`tensors`.
        """
        each = iter(tensors)
        pairs = tuple(pair._replace(down_RI=next(each), up_OR=next(each)) for pair in self.pairs)
        return BlockAdapter(pairs, None if self.prefix is None else Prefix(next(each), next(each)))


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """What is added to some blocks of a model.

    Args:
        blocks: By index; blocks that nothing is added to are left out.

    Raises:
        UsageError: If some blocks have a longer prefix than others.
    """

    blocks: Mapping[int, BlockAdapter]

    def __post_init__(self) -> None:
        lengths = {0 if one.prefix is None else one.prefix.key_KPW.shape[1] for one in self.blocks.values()}
        if len(lengths) > 1:
            raise UsageError(
                f"prefixes of {sorted(lengths)} tokens were given for blocks that are run together; give all the same"
            )

    @property
    def prefix_tokens(self) -> int:
        """How many tokens stand before the first."""
        for one in self.blocks.values():
            return 0 if one.prefix is None else int(one.prefix.key_KPW.shape[1])
        return 0

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that it consists of, block by block."""
        return tuple(tensor for index in sorted(self.blocks) for tensor in self.blocks[index].tensors)

    def prefixes(self, dtype: torch.dtype) -> dict[int, tuple[Tensor, Tensor]]:
        """Give each block's prefix, in a number format."""
        found = {index: one.prefix for index, one in self.blocks.items() if one.prefix is not None}
        return {index: (prefix.key_KPW.to(dtype), prefix.value_KPW.to(dtype)) for index, prefix in found.items()}

    def part(self, span: Span) -> "Adapter":
        """Take what is for some blocks."""
        return Adapter({index: one for index, one in self.blocks.items() if index in span})

    def with_tensors(self, tensors: Sequence[Tensor]) -> "Adapter":
        """Make one that differs in its tensors only.

        Args:
            tensors: As many as there are, in the order of :attr:`tensors`.
        """
        each, blocks = iter(tensors), {}
        for index in sorted(self.blocks):
            one = self.blocks[index]
            blocks[index] = one.with_tensors([next(each) for _ in one.tensors])
        return Adapter(blocks)


class Addition(Protocol):
    """What may be added to the output of a block's layers."""

    def layers(self, block: int) -> Sequence[str]:
        """Name the layers of a block that something is added to."""
        ...

    def add(self, block: int, layer: str, input: Tensor, output: Tensor) -> Tensor:
        """Give the output of one of them with what is added to it."""
        ...


@dataclass(frozen=True, slots=True)
class Alone:
    """One adapter for all tokens: bit for bit what PEFT computes."""

    adapter: Adapter

    def layers(self, block: int) -> Sequence[str]:
        """Name the layers of a block that something is added to."""
        one = self.adapter.blocks.get(block)
        return () if one is None else list(dict.fromkeys(pair.layer for pair in one.pairs))

    def add(self, block: int, layer: str, input: Tensor, output: Tensor) -> Tensor:
        """Give the output of one of them with what is added to it."""
        added = output
        for pair in self.adapter.blocks[block].pairs:
            if pair.layer == layer:
                added = pair.add(input, added)
        return added.to(output.dtype)


class _Gathered(NamedTuple):
    """The pairs that several adapters have for one layer, side by side; each rank belongs to one of them."""

    down_RI: Tensor
    up_OR: Tensor
    scaling_R: Tensor
    owner_R: Tensor


@dataclass(slots=True)
class RowAdapters:
    """The adapters of packed rows: one pair of products a layer for all of them, whatever their number.

    The ranks of all adapters lie side by side; what a token has in the ranks of others is blotted out in between. So
    no client's numbers reach another's, not even those that are none.

    Args:
        adapters: The adapters, each once.
        owner_N: For each token, the index of its adapter; -1 for none.
    """

    adapters: Sequence[Adapter]
    owner_N: Tensor
    _gathered: dict[tuple[int, str], _Gathered] = field(default_factory=dict)

    @classmethod
    def of(cls, adapters: Sequence[Adapter | None], counts: Sequence[int], device: torch.device) -> "Addition | None":
        """Say what is added to packed rows; ``None`` if nothing is.

        Args:
            adapters: For each row, its adapter.
            counts: For each row, how many tokens it has.
            device: Where they are.
        """
        paired = [one if one is not None and any(b.pairs for b in one.blocks.values()) else None for one in adapters]
        different = list(dict.fromkeys(one for one in paired if one is not None))
        if not different:
            return None
        if len(different) == 1 and None not in paired:
            return Alone(different[0])
        index = {one: place for place, one in enumerate(different)}
        owners = torch.tensor([-1 if one is None else index[one] for one in paired])
        return cls(different, owners.repeat_interleave(torch.tensor(counts)).to(device))

    def layers(self, block: int) -> Sequence[str]:
        """Name the layers of a block that something is added to."""
        return list(dict.fromkeys(layer for one in self.adapters for layer in Alone(one).layers(block)))

    def add(self, block: int, layer: str, input: Tensor, output: Tensor) -> Tensor:
        """Give the output of one of them with what is added to it."""
        found = self._gathered.get((block, layer))
        if found is None:
            found = self._gathered[block, layer] = self._gather(block, layer)
        ranks_NR = linear(input.to(found.down_RI.dtype), found.down_RI)
        own_NR = torch.where(self.owner_N[:, None] == found.owner_R, ranks_NR * found.scaling_R, 0.0)
        return (output + linear(own_NR, found.up_OR)).to(output.dtype)

    def _gather(self, block: int, layer: str) -> _Gathered:
        pairs = [
            (owner, pair)
            for owner, adapter in enumerate(self.adapters)
            if block in adapter.blocks
            for pair in adapter.blocks[block].pairs
            if pair.layer == layer
        ]
        ranks = torch.tensor([len(pair.down_RI) for _, pair in pairs])
        scalings = torch.tensor([pair.scaling for _, pair in pairs]).repeat_interleave(ranks)
        owners = torch.tensor([owner for owner, _ in pairs]).repeat_interleave(ranks)
        device = self.owner_N.device
        return _Gathered(
            torch.cat([pair.down_RI for _, pair in pairs]),
            torch.cat([pair.up_OR for _, pair in pairs], 1),
            scalings.to(device),
            owners.to(device),
        )


@contextmanager
def adding(blocks: Mapping[int, nn.Module], addition: Addition | None) -> Iterator[None]:
    """Let layers of blocks give more than they do by themselves, for as long as the context lasts.

    Args:
        blocks: The blocks by index.
        addition: What to add; ``None`` for nothing.
    """
    if addition is None:
        yield
        return
    with ExitStack() as stack:
        for index, block in blocks.items():
            for layer in addition.layers(index):
                hook = partial(_add, addition, index, layer)
                stack.callback(block.get_submodule(layer).register_forward_hook(hook).remove)
        yield


def _add(addition: Addition, block: int, layer: str, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return addition.add(block, layer, args[0], output)


def adaptable_layers(block: nn.Module) -> dict[str, tuple[int, int]]:
    """List the layers of a block that something can be added to, with how many numbers each takes and gives.

    Experts see some of the tokens only, so nobody could tell any more whose they are; they are left out.
    """
    found = {}
    for name, part in block.named_modules():
        if "experts" in name.split("."):
            continue
        if isinstance(part, nn.Linear | FrozenLayer):
            found[name] = (part.in_features, part.out_features)
        elif isinstance(part, Conv1D):
            found[name] = (int(part.weight.shape[0]), int(part.weight.shape[1]))
    return found


def check_fits(adapter: BlockAdapter, index: int, block: nn.Module, shape: KVShape | None) -> None:
    """Refuse what cannot be added to a block.

    Args:
        adapter: What is to be added.
        index: Which block, for the message.
        block: The block.
        shape: What its attention stores of a token; ``None`` if it has no keys and values of its own.

    Raises:
        UsageError: If it has no such layer, or one of another shape; or a prefix has another shape.
    """
    layers = adaptable_layers(block)
    for pair in adapter.pairs:
        sizes = layers.get(pair.layer)
        if sizes is None:
            raise UsageError(
                f"the adapter is for layer {pair.layer!r}, which block {index} does not have, or not to be adapted; it "
                f"has {', '.join(layers) or 'none'}"
            )
        if (pair.down_RI.shape[1], pair.up_OR.shape[0]) != sizes or pair.down_RI.shape[0] != pair.up_OR.shape[1]:
            raise UsageError(
                f"the adapter of layer {pair.layer!r} has shapes {list(pair.down_RI.shape)} and "
                f"{list(pair.up_OR.shape)}; in block {index} it takes {sizes[0]} numbers to {sizes[1]}: was the "
                "adapter made for another model?"
            )
    if adapter.prefix is not None:
        key_KPW, value_KPW = adapter.prefix
        given = KVShape(key_KPW.shape[0], key_KPW.shape[2], value_KPW.shape[2])
        if given != shape or key_KPW.shape[1] != value_KPW.shape[1]:
            raise UsageError(
                f"the prefix of block {index} has {given}; its attention stores {shape or 'none'}: was it made for "
                "another model?"
            )

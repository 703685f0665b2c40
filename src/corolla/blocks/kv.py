"""What the packed path asks of a store of keys and values, and one simple store.

Knows tensors and rows; not who owns the memory, pages, leases or sessions.
"""

# H heads of keys and values, T new tokens, L all stored tokens, D width of a head

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from corolla.blocks.adapters import Adapter

__all__ = ["GrowingKV", "KVShape", "KVView", "PackedRow"]


class KVView(Protocol):
    """One row's keys and values, for as many blocks as the row visits."""

    def append(self, block: int, key_HTD: Tensor, value_HTD: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        """Store the new tokens' keys and values and hand back all of the row's.

        Args:
            block: The block's index in the whole model.
            key_HTD: The new keys; they may be views that the caller will overwrite.
            value_HTD: The new values.

        Returns:
            ``key_HLD, value_HLD`` of everything stored for this row and block, in consecutive pieces, the new tokens at
            the end of the last; best one piece, and without copying. What the block cannot see any more may be missing.
        """
        ...

    def make_room(self, block: int, key_HTD: Tensor, value_HTD: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        """Do what :meth:`append` does, but let the caller write the new tokens to the end of the last piece."""
        ...


@dataclass(frozen=True, slots=True)
class PackedRow:
    """One sequence's part of a packed batch.

    Args:
        start: How many tokens the row has stored already; the position of its first new token.
        count: How many new tokens it gets, at least one.
        kv: Where its keys and values are.
        adapter: What is added to the blocks for it; ``None`` for nothing.
    """

    start: int
    count: int
    kv: KVView
    adapter: "Adapter | None" = None


@dataclass(frozen=True, slots=True)
class KVShape:
    """What one token of one block stores.

    Args:
        heads: Key heads; values have as many.
        key_width: Numbers in the key of one head.
        value_width: Numbers in the value of one head.
    """

    heads: int
    key_width: int
    value_width: int

    @property
    def numbers(self) -> int:
        """How many numbers one token of one block stores."""
        return self.heads * (self.key_width + self.value_width)

    def __str__(self) -> str:
        return f"{self.heads} heads of {self.key_width} numbers a key and {self.value_width} a value"


@dataclass(slots=True)
class GrowingKV:
    """A :class:`KVView` that grows by copying: for tests, self-tests and measuring, not for serving."""

    stored: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def append(self, block: int, key_HTD: Tensor, value_HTD: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        """Store the new tokens and hand back all; see :meth:`KVView.append`."""
        if block in self.stored:
            key_HLD, value_HLD = self.stored[block]
            self.stored[block] = (torch.cat((key_HLD, key_HTD), 1), torch.cat((value_HLD, value_HTD), 1))
        else:
            self.stored[block] = (key_HTD.clone(), value_HTD.clone())
        return (self.stored[block],)

    make_room = append

    def shapes(self, blocks: Sequence[int]) -> tuple[KVShape | None, ...]:
        """What one token of each block stores; ``None`` for a block that stored nothing."""
        return tuple(self._shape(block) for block in blocks)

    def _shape(self, block: int) -> KVShape | None:
        if block not in self.stored:
            return None
        key_HLD, value_HLD = self.stored[block]
        return KVShape(key_HLD.shape[0], key_HLD.shape[2], value_HLD.shape[2])

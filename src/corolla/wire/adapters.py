"""How adapters travel: block by block, each named by the hash of what it is.

Who asks for blocks to be run names what is to be added to each of them; only a server that has not got one of these is
sent it. So a prompt that has not changed is not sent again, whoever sent it first, and nobody can put anything else in
its place.
"""

import hashlib
from collections.abc import Iterable
from typing import Annotated

import msgspec
from msgspec import Meta

from corolla.terms import MAX_BLOCKS
from corolla.wire.parts import CheckedModelId
from corolla.wire.root import Message

__all__ = ["Adapt", "AdapterMeta", "BlockHash", "BlockHashes", "PairMeta", "PrefixMeta", "hash_adapter"]

_NUMBER_BYTES = 4
_HASH_BYTES = 32
_MAX_PAIRS = 512
_Size = Annotated[int, Meta(gt=0, le=2**24)]

BlockHash = Annotated[bytes, Meta(max_length=_HASH_BYTES)]
"""What :func:`hash_adapter` makes of what is added to one block; empty for nothing."""

BlockHashes = Annotated[tuple[BlockHash, ...], Meta(max_length=MAX_BLOCKS)]
"""One for each block that is run, in order; none at all if nothing is added anywhere."""


class PairMeta(msgspec.Struct, frozen=True, array_like=True):
    """The shape of one pair of LoRA.

    Args:
        name: Of the linear layer, within its block.
        ranks: How many ranks the pair has.
        inputs: How many numbers the layer takes.
        outputs: How many it gives.
        scaling: What the pair's product is multiplied by.
    """

    name: Annotated[str, Meta(min_length=1, max_length=256)]
    ranks: _Size
    inputs: _Size
    outputs: _Size
    scaling: float


class PrefixMeta(msgspec.Struct, frozen=True, array_like=True):
    """The shape of one block's prefix: for each head, so many tokens' keys and values."""

    heads: _Size
    tokens: _Size
    key_width: _Size
    value_width: _Size


class AdapterMeta(msgspec.Struct, frozen=True, array_like=True):
    """What is added to one block. Its numbers are float32, little-endian: of each pair the one that goes down and the
    one that goes up, then of the prefix the keys and the values.

    Args:
        pairs: The pairs.
        prefix: The prefix; ``None`` if there is none.
    """

    pairs: Annotated[tuple[PairMeta, ...], Meta(max_length=_MAX_PAIRS)]
    prefix: PrefixMeta | None = None

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of its tensors, in order."""
        shapes: list[tuple[int, ...]] = []
        for one in self.pairs:
            shapes += [(one.ranks, one.inputs), (one.outputs, one.ranks)]
        if (prefix := self.prefix) is not None:
            shapes += [(prefix.heads, prefix.tokens, width) for width in (prefix.key_width, prefix.value_width)]
        return tuple(shapes)

    @property
    def nbytes(self) -> int:
        """How many bytes of a payload it takes."""
        total = 0
        for shape in self.shapes:
            numbers = 1
            for size in shape:
                numbers *= size
            total += numbers * _NUMBER_BYTES
        return total


class Adapt(Message, frozen=True, tag=True):
    """Gives a server what is to be added to some of its blocks; answered by ``Ack``.

    The payload is what :class:`AdapterMeta` describes, one after the other.

    Args:
        model: The weights that it is for.
        blocks: The blocks.
        metas: What is added to each of them.
    """

    model: CheckedModelId
    blocks: Annotated[tuple[Annotated[int, Meta(ge=0, lt=MAX_BLOCKS)], ...], Meta(min_length=1, max_length=MAX_BLOCKS)]
    metas: Annotated[tuple[AdapterMeta, ...], Meta(min_length=1, max_length=MAX_BLOCKS)]


_ENCODER = msgspec.msgpack.Encoder()


def hash_adapter(meta: AdapterMeta, numbers: Iterable[bytes | bytearray | memoryview]) -> bytes:
    """Name what is added to a block by what it is.

    Args:
        meta: Its shape.
        numbers: Its numbers, in any pieces.
    """
    sha = hashlib.sha256(_ENCODER.encode(meta))
    for piece in numbers:
        sha.update(piece)
    return sha.digest()

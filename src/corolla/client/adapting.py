"""Adapters whose owner is this side: read off the model, named by their hashes, and sent to whoever has not got them.

What trains stays here, as parameters of PEFT's own layers beside layers that are elsewhere. Knows those by what they
look like, so that PEFT need not be installed to use a model.
"""

# R ranks, I inputs, O outputs, K key heads, P tokens of a prefix, W head width

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import anyio
from torch import Tensor, nn

from corolla.blocks import RemoteLayer
from corolla.codec import AdapterParts, EncodedAdapter, encode_adapter
from corolla.errors import UsageError
from corolla.swarm import Channel
from corolla.terms import Announcement, ModelId, PeerId, Span
from corolla.wire import Ack, Adapt
from corolla.wire.limits import MAX_PAYLOAD_BYTES

__all__ = ["ClientAdapter", "Deliveries", "read_adapter", "with_prefixes"]

_REMEMBERED = 1 << 14
"""Blocks' adapters that a peer is remembered to have; those of earlier steps are never asked for again."""


@dataclass(frozen=True, eq=False)
class ClientAdapter:
    """What is added to some blocks of a model, as its owner has it.

    Args:
        blocks: By index.
    """

    blocks: Mapping[int, AdapterParts]

    @cached_property
    def encoded(self) -> dict[int, EncodedAdapter]:
        """Each block's as it travels. The numbers must not change any more, until the way back is over."""
        return {index: encode_adapter(parts) for index, parts in self.blocks.items()}

    def tensors(self, span: Span | None = None) -> list[Tensor]:
        """List all that it consists of, block by block, in the order in which servers give gradients.

        Args:
            span: Of which blocks; ``None`` for all.
        """
        found = []
        for index in sorted(self.blocks):
            if span is None or index in span:
                pairs, prefix = self.blocks[index]
                found += [tensor for _, down_RI, up_OR, _ in pairs for tensor in (down_RI, up_OR)]
                found += prefix or ()
        return found

    def part(self, span: Span) -> "ClientAdapter | None":
        """Take what is for some blocks; ``None`` if that is nothing."""
        blocks = {index: parts for index, parts in self.blocks.items() if index in span}
        return ClientAdapter(blocks) if blocks else None

    def hashes(self, span: Span) -> tuple[bytes, ...]:
        """Name what is added to each of some blocks; empty if nothing is added to any of them."""
        named = tuple(self.encoded[index].hash if index in self.blocks else b"" for index in span.indices)
        return named if any(named) else ()


class Deliveries:
    """Which adapters which peers are believed to have."""

    def __init__(self) -> None:
        self._known: dict[PeerId, dict[bytes, None]] = {}
        self._locks: dict[PeerId, anyio.Lock] = {}
        self._lacking: set[PeerId] = set()

    def forget(self, peer: PeerId) -> None:
        """Believe nothing of a peer any more, because it has said that it lacks something."""
        self._known.pop(peer, None)
        self._lacking.add(peer)

    def may_have(self, server: Announcement) -> bool:
        """Say whether a server may have what nobody has sent it: it hosts adapters, and has lacked none so far."""
        return bool(server.adapters) and server.peer not in self._lacking

    async def deliver(
        self, channel: Channel, model: ModelId, adapter: ClientAdapter, span: Span, deadline_s: float
    ) -> None:
        """Send a peer what it has not got.

        Args:
            channel: To the peer.
            model: The weights that the adapter is for.
            adapter: The adapter.
            span: The blocks that the peer is about to run.
            deadline_s: Limit for each answer.

        Raises:
            Error: What the peer said, or how it failed.
        """
        async with self._locks.setdefault(channel.peer, anyio.Lock()):
            known = self._known.setdefault(channel.peer, {})
            missing = [
                index for index in span.indices if index in adapter.blocks and adapter.encoded[index].hash not in known
            ]
            for some in _batches(missing, adapter.encoded):
                encoded = [adapter.encoded[index] for index in some]
                message = Adapt(model=model, blocks=tuple(some), metas=tuple(one.meta for one in encoded))
                buffers = [buffer for one in encoded for buffer in one.buffers]
                await channel.request(message, buffers, expected=Ack, deadline_s=deadline_s)
                known.update(dict.fromkeys(one.hash for one in encoded))
            while len(known) > _REMEMBERED:
                del known[next(iter(known))]


def read_adapter(stand_ins: Sequence[nn.Module]) -> ClientAdapter | None:
    """Read off a model what PEFT has put beside the layers of its blocks.

    Args:
        stand_ins: What stands in the blocks' place.

    Returns:
        What is active now; ``None`` if nothing is.

    Raises:
        UsageError: If something is there that servers cannot add: dropout on the way into LoRA, or another method.
    """
    blocks = {}
    for index, block in enumerate(stand_ins):
        pairs = [pair for name, part in block.named_modules() for pair in _read_layer(index, name, part)]
        if pairs:  # in the order of their names, so that the same adapter has the same hash everywhere
            blocks[index] = AdapterParts(sorted(pairs, key=lambda pair: pair[0]), None)
    return ClientAdapter(blocks) if blocks else None


def with_prefixes(
    adapter: ClientAdapter | None, prefixes: Sequence[tuple[Tensor, Tensor]], span: Span
) -> ClientAdapter:
    """Add keys and values that stand before the first token.

    Args:
        adapter: What else is added; ``None`` for nothing.
        prefixes: For each block, keys and values ``[K, P, W]``.
        span: The blocks.

    Raises:
        UsageError: If there are not as many as there are blocks.
    """
    if len(prefixes) != len(span):
        raise UsageError(f"a prefix for {len(prefixes)} blocks came; blocks {span} are {len(span)}")
    own = {} if adapter is None else adapter.blocks
    return ClientAdapter(
        {
            index: AdapterParts(own[index].pairs if index in own else [], prefix)
            for index, prefix in zip(span.indices, prefixes, strict=True)
        }
    )


def _read_layer(block: int, name: str, part: Any) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    if not isinstance(getattr(part, "base_layer", None), RemoteLayer):
        return
    where = f"{name} of block {block}"
    if not hasattr(part, "lora_A"):
        raise UsageError(
            f"{where} runs on servers, which add LoRA and prefixes; {type(part).__name__} cannot be added there"
        )
    if part._forward_pre_hooks:
        raise UsageError(f"{where} was given adapter_names for each row; servers take one adapter for a whole batch")
    for adapter in () if part.disable_adapters else part.active_adapters:
        if adapter not in part.lora_A:
            continue
        down, up, dropout = part.lora_A[adapter], part.lora_B[adapter], part.lora_dropout[adapter]
        if adapter in part.lora_variant or up.bias is not None:
            raise UsageError(
                f"the adapter {adapter!r} of {where} is a variant of LoRA that servers do not know; use plain LoRA"
            )
        if part.training and getattr(dropout, "p", 0.0):
            raise UsageError(
                f"the adapter {adapter!r} of {where} has lora_dropout {dropout.p:g}, which servers cannot do; set 0"
            )
        yield name, down.weight, up.weight, float(part.scaling[adapter])


def _batches(indices: Sequence[int], encoded: Mapping[int, EncodedAdapter]) -> Iterator[list[int]]:
    """Cut what is to be sent so that each part fits into a message."""
    some: list[int] = []
    nbytes = 0
    for index in indices:
        if some and nbytes + encoded[index].meta.nbytes > MAX_PAYLOAD_BYTES:
            yield some
            some, nbytes = [], 0
        some.append(index)
        nbytes += encoded[index].meta.nbytes
    if some:
        yield some

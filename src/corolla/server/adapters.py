"""The adapters that a server has: named by their hashes, within a budget of memory, the longest unused leave first.

Owns their memory. Knows blocks and the wire; not who asks for what.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import anyio
import torch

from corolla.blocks import Adapter, BlockAdapter, BlockSpan, LoraPair, Prefix
from corolla.codec import AdapterParts, EncodedAdapter, decode_adapter
from corolla.errors import AdapterMissing, CapacityError, RemoteProtocolError
from corolla.telemetry import event, logger
from corolla.terms import Span
from corolla.wire import Adapt, AdapterMeta, hash_adapter, split_payload

__all__ = ["AdapterStore"]

_LOG = logger(__name__)


@dataclass(slots=True, eq=False)
class _Kept:
    """What is added to some block.

    Attributes:
        adapter: It.
        uses: How many sessions and requests use it now.
        is_hosted: Whether it stays for as long as the server runs.
        fits: The blocks that it is known to fit.
    """

    adapter: BlockAdapter
    uses: int = 0
    is_hosted: bool = False
    fits: set[int] = field(default_factory=set)


class AdapterStore:
    """Keeps adapters, block by block. Its methods belong to the event loop.

    Args:
        budget_bytes: How much memory they may take.

    Attributes:
        hosted: The names of the adapters that the server has by itself.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.hosted: tuple[str, ...] = ()
        self._budget_bytes = budget_bytes
        self._kept: dict[bytes, _Kept] = {}  # the longest unused first
        self._used_bytes = 0

    @property
    def accepts(self) -> bool:
        """Whether clients may bring their own."""
        return self._budget_bytes > 0

    @property
    def used_bytes(self) -> int:
        """How much memory the adapters take."""
        return self._used_bytes

    async def take(self, span: BlockSpan, message: Adapt, payload: memoryview) -> None:
        """Keep what a client has sent.

        Args:
            span: The blocks that it is for.
            message: What it is.
            payload: Its numbers.

        Raises:
            RemoteProtocolError: If message and payload do not fit together.
            UsageError: If it cannot be added to the blocks.
            CapacityError: If there is no room for it.
        """
        if len(message.blocks) != len(message.metas):
            raise RemoteProtocolError(f"{len(message.metas)} adapters came for {len(message.blocks)} blocks")
        parts = split_payload(payload, [meta.nbytes for meta in message.metas])
        for index, meta, part in zip(message.blocks, message.metas, parts, strict=True):
            self._make_room(meta.nbytes)
            name, adapter = await anyio.to_thread.run_sync(partial(_read, meta, part, span.device))
            span.check_adapter(index, adapter)
            self._keep(name, _Kept(adapter, fits={index}))

    def host(self, span: BlockSpan, name: str, blocks: dict[int, EncodedAdapter]) -> None:
        """Keep an adapter for as long as the server runs.

        Args:
            span: The blocks that the server has.
            name: The adapter's name, for all.
            blocks: What is added to each of them.

        Raises:
            UsageError: If it cannot be added to the blocks.
            CapacityError: If there is no room for it.
        """
        for index, encoded in blocks.items():
            numbers = bytearray(b"".join(encoded.buffers))
            adapter = _made(decode_adapter(encoded.meta, numbers), span.device)
            span.check_adapter(index, adapter)
            self._make_room(encoded.meta.nbytes)
            self._keep(encoded.hash, _Kept(adapter, is_hosted=True, fits={index}))
        self.hosted = (*dict.fromkeys((*self.hosted, name)),)
        event(_LOG, "adapter hosted", adapter=name[:12], blocks=len(blocks), used_bytes=self._used_bytes)

    @contextmanager
    def lend(self, span: BlockSpan, blocks: Span, hashes: Sequence[bytes]) -> Iterator[Adapter | None]:
        """Give what is to be added to some blocks, and keep it for as long as the context lasts.

        Args:
            span: The blocks that the server has.
            blocks: Those that are run.
            hashes: For each of them, what is added to it.

        Raises:
            RemoteProtocolError: If these are not as many as the blocks.
            AdapterMissing: If something is not here.
            UsageError: If something cannot be added to its block.
        """
        if hashes and len(hashes) != len(blocks):
            raise RemoteProtocolError(f"{len(hashes)} adapters were named for {len(blocks)} blocks")
        wanted = {index: name for index, name in zip(blocks.indices, hashes, strict=False) if name}
        if not wanted:
            yield None
            return
        if missing := [index for index, name in wanted.items() if name not in self._kept]:
            raise AdapterMissing(f"the adapters of blocks {missing} are not here, or not any more; send them (again)")
        used = {index: self._kept[name] for index, name in wanted.items()}
        for index, kept in used.items():
            if index not in kept.fits:
                span.check_adapter(index, kept.adapter)
                kept.fits.add(index)
        adapter = Adapter({index: kept.adapter for index, kept in used.items()})
        for name, kept in zip(wanted.values(), used.values(), strict=True):
            kept.uses += 1
            self._kept[name] = self._kept.pop(name)
        try:
            yield adapter
        finally:
            for kept in used.values():
                kept.uses -= 1

    def _keep(self, name: bytes, kept: _Kept) -> None:
        known = self._kept.pop(name, None)
        if known is None:
            self._used_bytes += kept.adapter.nbytes
        else:
            known.is_hosted = known.is_hosted or kept.is_hosted
            known.fits |= kept.fits
            kept = known
        self._kept[name] = kept

    def _make_room(self, nbytes: int) -> None:
        """Let go of what is not used, the longest unused first, until so many bytes are free."""
        idle = (name for name, kept in [*self._kept.items()] if not kept.uses and not kept.is_hosted)
        while self._used_bytes + nbytes > self._budget_bytes:
            name = next(idle, None)
            if name is None:
                raise CapacityError(
                    f"{nbytes} bytes of an adapter were sent; of the {self._budget_bytes} lent to adapters "
                    f"{self._used_bytes} are in use"
                )
            self._used_bytes -= self._kept.pop(name).adapter.nbytes


def _read(meta: AdapterMeta, part: memoryview, device: torch.device) -> tuple[bytes, BlockAdapter]:
    name = hash_adapter(meta, [part])
    return name, _made(decode_adapter(meta, part), device)


def _made(parts: AdapterParts, device: torch.device) -> BlockAdapter:
    pairs = tuple(
        LoraPair(name, down_RI.to(device), up_OR.to(device), scaling) for name, down_RI, up_OR, scaling in parts.pairs
    )
    if parts.prefix is None:
        return BlockAdapter(pairs)
    key_KPW, value_KPW = parts.prefix
    return BlockAdapter(pairs, Prefix(key_KPW.to(device), value_KPW.to(device)))

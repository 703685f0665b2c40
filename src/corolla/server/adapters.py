"""The adapters that a server has: named by their hashes, within a budget of memory, the longest unused leave first.

Owns their memory. Knows blocks and the wire; not who asks for what.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import anyio
import torch

from corolla.blocks import Adapter, BlockAdapter, BlockSpan, LoraPair, Prefix
from corolla.codec import AdapterParts, EncodedAdapter, decode_adapter
from corolla.errors import AdapterMissing, CapacityError, RemoteProtocolError
from corolla.sharing import Shelf
from corolla.telemetry import event, logger
from corolla.terms import Span
from corolla.wire import Adapt, AdapterMeta, hash_adapter, split_payload

__all__ = ["AdapterStore"]

_LOG = logger(__name__)
_ANNOUNCED = 16


@dataclass(slots=True, eq=False)
class _Kept:
    """What is added to some block.

    Attributes:
        adapter: It.
        uses: How many sessions and requests use it now.
        stays: Whether it does not leave for as long as the server runs.
        fits: The blocks that it is known to fit.
    """

    adapter: BlockAdapter
    uses: int = 0
    stays: bool = False
    fits: set[int] = field(default_factory=set)


class AdapterStore:
    """Keeps adapters, block by block. Its methods belong to the event loop.

    Args:
        budget_bytes: How much memory they may take.
        shelf: Where published ones lie, for whoever asks; ``None`` for none.
    """

    def __init__(self, budget_bytes: int, shelf: Shelf | None = None) -> None:
        self.shelf = shelf
        self._hosted: dict[str, frozenset[bytes]] = {}
        self._budget_bytes = budget_bytes
        self._kept: dict[bytes, _Kept] = {}  # the longest unused first
        self._used_bytes = 0

    @property
    def accepts(self) -> bool:
        """Whether clients may bring their own."""
        return self._budget_bytes > 0

    @property
    def hosted(self) -> tuple[str, ...]:
        """The names of the adapters that the server has ready now, whole; the last few, as announcements are short."""
        return tuple(name for name, parts in self._hosted.items() if parts <= self._kept.keys())[-_ANNOUNCED:]

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

    def host(self, span: BlockSpan, name: str, blocks: dict[int, EncodedAdapter], *, stays: bool = True) -> None:
        """Have an adapter ready, all of it or nothing.

        Args:
            span: The blocks that the server has.
            name: The adapter's name, for all.
            blocks: What is added to each of them.
            stays: Whether it is kept for as long as the server runs; else it leaves as others do.

        Raises:
            UsageError: If it cannot be added to the blocks.
            CapacityError: If there is no room for it.
        """
        made = {}
        for index, encoded in blocks.items():
            numbers = bytearray(b"".join(encoded.buffers))
            adapter = _made(decode_adapter(encoded.meta, numbers), span.device)
            span.check_adapter(index, adapter)
            made[encoded.hash] = _Kept(adapter, stays=stays, fits={index})
        self._make_room(sum(kept.adapter.nbytes for hash, kept in made.items() if hash not in self._kept), made)
        for hash, kept in made.items():
            self._keep(hash, kept)
        self._hosted = {known: parts for known, parts in self._hosted.items() if parts <= self._kept.keys()}
        self._hosted[name] = frozenset(made)
        event(_LOG, "adapter hosted", adapter=name, blocks=len(blocks), used_bytes=self._used_bytes)

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
            known.stays = known.stays or kept.stays
            known.fits |= kept.fits
            kept = known
        self._kept[name] = kept

    def _make_room(self, nbytes: int, wanted: Collection[bytes] = ()) -> None:
        """Let go of what is neither used nor wanted, the longest unused first, until so many bytes are free."""
        idle = [name for name, kept in self._kept.items() if not kept.uses and not kept.stays and name not in wanted]
        idle_bytes = sum(self._kept[name].adapter.nbytes for name in idle)
        if self._used_bytes - idle_bytes + nbytes > self._budget_bytes:
            raise CapacityError(
                f"{nbytes} bytes of an adapter were to be kept; of the {self._budget_bytes} lent to adapters "
                f"{self._used_bytes - idle_bytes} are in use"
            )
        while self._used_bytes + nbytes > self._budget_bytes:
            self._used_bytes -= self._kept.pop(idle.pop(0)).adapter.nbytes


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

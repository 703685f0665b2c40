"""Memory for the keys and values of a row in one block: taken as tokens are written, given back as they leave.

On a CPU an extent is a range of addresses. The system puts memory behind it where something is written, a few tokens
at a time, so room for a whole lease costs nothing before its tokens come, and nothing is ever moved. On other devices
an extent is as large as its tokens need, and half as large again whenever it is full.
"""

# H KV heads, T new tokens, L stored tokens, C tokens of room, D head width

import mmap
from typing import Final

import torch
from torch import Tensor

from corolla.cache.pool import PAGE_TOKENS, pages_for

__all__ = ["Extent"]

_CAN_GIVE_BACK: Final = hasattr(mmap, "MADV_DONTNEED")
_SMALL_PAGES: Final = getattr(mmap, "MADV_NOHUGEPAGE", None)
"""Pages of two megabytes would put memory behind tokens that may never come."""


class Extent:
    """Room for consecutive tokens of one row in one block.

    Args:
        key_HTD: Keys as they will be written: their heads, width, format and device.
        value_HTD: Values likewise; their width may be another.
        first: Where in the row the first token stands.
        tokens: How many there is room for.

    Attributes:
        bottom: The first token that is still there.
        top: One past the last token that was written.
    """

    __slots__ = ("_first", "_keys_HCD", "_memory", "_values_HCD", "bottom", "top")

    def __init__(self, key_HTD: Tensor, value_HTD: Tensor, first: int, tokens: int) -> None:
        self._first = self.bottom = self.top = first
        shapes = [(part.shape[0], tokens, part.shape[2]) for part in (key_HTD, value_HTD)]
        self._memory: mmap.mmap | None = None
        if key_HTD.device.type != "cpu":
            self._keys_HCD, self._values_HCD = (key_HTD.new_empty(shape) for shape in shapes)
            return
        counts = [heads * tokens * width for heads, _, width in shapes]
        self._memory = _reserve(sum(counts) * key_HTD.itemsize)
        numbers = torch.frombuffer(self._memory, dtype=key_HTD.dtype, count=sum(counts))
        keys, values = numbers.split(counts)
        self._keys_HCD, self._values_HCD = keys.view(shapes[0]), values.view(shapes[1])

    @property
    def stop(self) -> int:
        """One past the last token that there is room for."""
        return self._first + self._keys_HCD.shape[1]

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's key and value."""
        return (self._keys_HCD.nbytes + self._values_HCD.nbytes) // self._keys_HCD.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it takes, in whole pages."""
        room = self._keys_HCD.shape[1] if self._memory is None else pages_for(self.top - self.bottom) * PAGE_TOKENS
        return room * self.token_bytes

    def write(self, start: int, key_HTD: Tensor, value_HTD: Tensor) -> None:
        """Write tokens from a place in the row on."""
        stop = start + key_HTD.shape[1]
        self._keys_HCD[:, start - self._first : stop - self._first] = key_HTD
        self._values_HCD[:, start - self._first : stop - self._first] = value_HTD
        self.top = max(self.top, stop)

    def view(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Show keys and values ``[H, L, D]`` of some tokens where they lie; what is left of those before ``bottom``."""
        begin, end = max(0, start - self._first), stop - self._first
        return self._keys_HCD[:, begin:end], self._values_HCD[:, begin:end]

    def trim(self, stop: int) -> None:
        """Give back the memory of tokens from ``stop`` on."""
        stop = max(stop, self._first)
        if stop >= self.top:
            return
        if self._memory is not None:
            self._give_back(stop, self.top)
        elif 2 * (stop - self._first) < self._keys_HCD.shape[1]:
            self._keep(self._first, stop)
        self.top = stop

    def drop(self, start: int) -> None:
        """Give back the memory of tokens before ``start``; they are never asked for again."""
        if self._memory is not None:
            self._give_back(self.bottom, start)
            self.bottom = start
        elif 2 * (start - self._first) > self._keys_HCD.shape[1]:
            self._keep(start, self.top)

    def _keep(self, start: int, stop: int) -> None:
        """Move some tokens to room of their own."""
        keys_HLD, values_HLD = self.view(start, stop)
        self._keys_HCD, self._values_HCD, self._first = keys_HLD.clone(), values_HLD.clone(), start
        self.bottom = start

    def _give_back(self, start: int, stop: int) -> None:
        if not _CAN_GIVE_BACK:
            return
        assert self._memory is not None
        base = self._keys_HCD.data_ptr()
        for part_HCD in (self._keys_HCD, self._values_HCD):
            slot_bytes = part_HCD.shape[2] * part_HCD.itemsize
            for head in range(part_HCD.shape[0]):
                offset = part_HCD.data_ptr() - base + head * part_HCD.shape[1] * slot_bytes
                begin = offset + (start - self._first) * slot_bytes
                end = offset + (stop - self._first) * slot_bytes
                begin, end = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
                if begin < end:
                    self._memory.madvise(mmap.MADV_DONTNEED, begin, end - begin)


def _reserve(nbytes: int) -> mmap.mmap:
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return mmap.mmap(-1, nbytes)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if _SMALL_PAGES is not None:
        memory.madvise(_SMALL_PAGES)
    return memory

"""The bytes that were sent, for as long as a log refers to them: the newest in memory, older ones in files.

A file is written once, mapped into memory and already deleted; the system takes it back when the last of its bytes is
forgotten, also after a crash.
"""

import mmap
import tempfile
import weakref
from collections.abc import Sequence

import anyio

from corolla.wire import Buffer, TensorMeta

__all__ = ["Sent", "Store"]


class Sent:
    """One encoded tensor as it was sent.

    Args:
        meta: How to read it.
        payload: Its bytes, wherever they are.
    """

    __slots__ = ("__weakref__", "meta", "payload")

    def __init__(self, meta: TensorMeta, payload: memoryview) -> None:
        self.meta = meta
        self.payload = payload


class Store:
    """Keeps what was sent for as long as anybody holds on to its :class:`Sent`.

    Args:
        limit_bytes: How much may be in memory, over all logs; :meth:`settle` moves what is over it to a file.

    Attributes:
        memory_bytes: How much is in memory, what was forgotten since the last :meth:`settle` included.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._in_memory: list[weakref.ref[Sent]] = []
        self._is_settling = False
        self.memory_bytes = 0

    def keep(self, meta: TensorMeta, buffers: Sequence[Buffer]) -> Sent:
        """Copy an encoded tensor, so that it can be sent now and again."""
        sent = Sent(meta, memoryview(b"".join(buffers)))
        self._in_memory.append(weakref.ref(sent))
        self.memory_bytes += sent.payload.nbytes
        return sent

    async def settle(self) -> None:
        """Move the oldest bytes to a file if memory holds more than the limit."""
        if self.memory_bytes <= self._limit_bytes or self._is_settling:
            return
        living = [sent for found in self._in_memory if (sent := found()) is not None]
        self.memory_bytes = sum(sent.payload.nbytes for sent in living)
        moved: list[Sent] = []
        if self.memory_bytes > self._limit_bytes:
            while self.memory_bytes > self._limit_bytes // 2:  # more than needed: not a file for every step
                moved.append(living[len(moved)])
                self.memory_bytes -= moved[-1].payload.nbytes
        self._in_memory = [weakref.ref(sent) for sent in living[len(moved) :]]
        if moved:
            self._is_settling = True
            try:
                await anyio.to_thread.run_sync(_move_to_file, moved)
            finally:
                self._is_settling = False


def _move_to_file(moved: Sequence[Sent]) -> None:
    with tempfile.TemporaryFile() as file:
        file.writelines(sent.payload for sent in moved)
        file.flush()
        whole = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    start = 0
    for sent in moved:
        stop = start + sent.payload.nbytes
        sent.payload = whole[start:stop]
        start = stop

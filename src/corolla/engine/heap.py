"""Memory that was freed goes back to the system, where the C library would keep it for later.

glibc keeps what a large prompt, or the casting of weights, has freed: 15 to 100 MB in a server of ten small blocks.
Knows nothing of who used it.
"""

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Final

__all__ = ["BULK_TOKENS", "give_back", "kept_apart", "share_heap"]

BULK_TOKENS: Final = 128
"""A tick of so many tokens leaves enough behind to be worth a few milliseconds."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h
_LARGE_BYTES: Final = 128 << 10
_POOLED_BYTES: Final = 32 << 20  # the most that glibc takes


def give_back() -> None:
    """Return what is free to the system; takes milliseconds. Does nothing where the C library is not glibc."""
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(0)


@contextmanager
def kept_apart() -> Iterator[None]:
    """Give each large allocation pages of its own, which go back once it is freed, while the body runs.

    Weights that are cast and ordered one after another leave no holes between those that stay. Afterwards the C library
    keeps and reuses what is freed, since tensors that come and go with each tick would be slowed down by fresh pages.
    """
    option = _glibc("mallopt")
    if option is None:
        yield
        return
    option(_M_MMAP_THRESHOLD, _LARGE_BYTES)
    try:
        yield
    finally:
        option(_M_MMAP_THRESHOLD, _POOLED_BYTES)
        option(_M_TRIM_THRESHOLD, 2 * _POOLED_BYTES)


def share_heap() -> None:
    """Let all threads to come take memory from one heap, where each would get one of its own, with holes of its own.

    For a program that begins: it concerns the whole process.
    """
    option = _glibc("mallopt")
    if option is not None:
        option(_M_ARENA_MAX, 1)


@cache
def _glibc(name: str) -> Callable[..., int] | None:
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), name, None)  # musl has none of them

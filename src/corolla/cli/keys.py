"""Single keys from the terminal, as they are pressed. On Windows, where a console cannot be waited for, none come."""

import os
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import anyio

__all__ = ["pressed_keys", "unbuffered"]


@contextmanager
def unbuffered() -> Iterator[None]:
    """Have the terminal give each key at once and show none of them, for the length of a ``with``."""
    if sys.platform == "win32":
        yield
        return
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


async def pressed_keys() -> AsyncIterator[str]:
    """Give keys until the terminal is gone."""
    if sys.platform == "win32":
        await anyio.sleep_forever()
    while True:
        await anyio.wait_readable(sys.stdin)
        key = os.read(sys.stdin.fileno(), 1)
        if not key:
            return
        yield key.decode(errors="replace")

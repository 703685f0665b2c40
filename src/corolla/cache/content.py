"""What a row was computed from, told by digests: rows that begin with the same content begin with the same numbers."""

import hashlib
from collections.abc import Sequence

from corolla.cache.pool import PAGE_TOKENS

__all__ = ["Content"]


class Content:
    """The digests of a row's tokens, and of each whole page the key of all up to its end.

    A key is a hash of the key before it and of the page's digests, and the first one of the root: whoever has the same
    key has the same root and the same tokens in the same places.

    Args:
        root: What else decides the keys and values of tokens, and who may share them.

    Attributes:
        keys: One for each whole page, the first page first.
    """

    __slots__ = ("_digests", "_root", "keys")

    def __init__(self, root: bytes) -> None:
        self._root = root
        self._digests: list[bytes] = []
        self.keys: list[bytes] = []

    @property
    def tokens(self) -> int:
        """How many tokens are known."""
        return len(self._digests)

    def keys_with(self, digests: Sequence[bytes]) -> list[bytes]:
        """Say which keys there are once tokens of these digests follow."""
        keys = self.keys[:]
        tail = self._digests[len(keys) * PAGE_TOKENS :] + [*digests]
        for first in range(0, len(tail) - PAGE_TOKENS + 1, PAGE_TOKENS):
            before = keys[-1] if keys else self._root
            keys.append(hashlib.sha256(before + b"".join(tail[first : first + PAGE_TOKENS])).digest())
        return keys

    def add(self, digests: Sequence[bytes]) -> None:
        """Note that tokens of these digests follow."""
        self.keys = self.keys_with(digests)
        self._digests += digests

    def cut(self, tokens: int) -> None:
        """Forget what comes after so many tokens."""
        if tokens < len(self._digests):
            del self._digests[tokens:]
            del self.keys[tokens // PAGE_TOKENS :]

    def fork(self, tokens: int) -> "Content":
        """Give another that begins with these tokens."""
        twin = Content(self._root)
        twin._digests, twin.keys = self._digests[:tokens], self.keys[: tokens // PAGE_TOKENS]
        return twin

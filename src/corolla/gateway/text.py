"""Tokens to text as they come: whole characters only, and nothing of what a stop string may turn out to be.

Knows no model and no HTTP.
"""

from collections.abc import Callable, Sequence

__all__ = ["Spelling", "StopFinder"]

_CONTEXT_TOKENS = 6
"""Tokenizers write a token otherwise after others; so many tokens before it tell how."""
_SPELLED_AGAIN_TOKENS = 32
"""Each new token is spelled with those before it, up to so many; then the first of them are let go of."""
_UNFINISHED = "\ufffd"


class Spelling:
    """Spells tokens, one after another; the pieces joined are what the tokens say after the prompt.

    Args:
        decode: Tokens to text.
        prompt: The tokens before the first one.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int]) -> None:
        self._decode = decode
        self._tokens = list(prompt[-_CONTEXT_TOKENS:])
        self._spelled = decode(self._tokens)

    def push(self, token: int) -> str:
        """Give the text that is certain now: empty in the middle of a character."""
        self._tokens.append(token)
        return self._spell(is_last=False)

    def end(self) -> str:
        """Give what is left, a broken character perhaps."""
        return self._spell(is_last=True)

    def _spell(self, *, is_last: bool) -> str:
        now = self._decode(self._tokens)
        if len(now) <= len(self._spelled) or (now.endswith(_UNFINISHED) and not is_last):
            return ""
        text, self._spelled = now[len(self._spelled) :], now
        if len(self._tokens) > _SPELLED_AGAIN_TOKENS:
            self._tokens = self._tokens[-_CONTEXT_TOKENS:]
            self._spelled = self._decode(self._tokens)
        return text


class StopFinder:
    """Lets text through up to the first stop string that is complete, wherever the pieces of text end.

    Args:
        stops: The stop strings, of any length.

    Attributes:
        found: The stop string that was found; ``None`` before.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """Give the text that no stop string can take any more."""
        if self.found is not None:
            return ""
        text = self._held + text
        ends = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            _, at, self.found = min(ends)
            self._held = ""
            return text[:at]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def end(self) -> str:
        """Give what was held back and is no stop string after all."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Count the letters at the end of a text with which a stop string begins."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)

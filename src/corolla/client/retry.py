"""The one place that tries again. What may be retried, and whom to avoid, the errors say themselves."""

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol, TypeVar

from corolla.errors import Error, SwarmError
from corolla.telemetry import event, logger
from corolla.terms import Chain, PeerId

__all__ = ["Router", "try_chains"]

_LOG = logger(__name__)
_T = TypeVar("_T")


class Router(Protocol):
    """Who chooses chains and hears how they did."""

    async def find_chain(self) -> Chain:
        """Choose a chain that avoids banned peers."""
        ...

    def blame(self, peer: PeerId, error: Error) -> None:
        """Hear of a peer's failure: avoid it from now on, as far as the error says."""
        ...


async def try_chains(router: Router, attempt: Callable[[Chain], Awaitable[_T]], *, attempts: int) -> _T:
    """Try something on one chain after another until it succeeds.

    Args:
        router: Who chooses the chains.
        attempt: What to do with a chain; a failed attempt must leave nothing behind.
        attempts: How many failures to suffer at most. That a peer is busy is none: the router knows for how long to put
            up with it.

    Returns:
        What the first successful attempt returned.

    Raises:
        NoChain: If no further chain can be found.
        Error: The last one, if another chain cannot help or all attempts are used up. Either message lists what was
            tried before.
    """
    tried: dict[str, str] = {}
    failures = 0
    while True:
        try:
            chain = await router.find_chain()
        except SwarmError as error:
            _add(error, "; tried before: ", tried)
            raise
        try:
            return await attempt(chain)
        except Error as error:
            if error.retry == "never" or error.peer is None:
                raise
            peer = PeerId(error.peer)
            router.blame(peer, error)
            failures += error.retry_after_s is None
            why, level = error.message[:240], logging.WARNING
            event(_LOG, "attempt failed", level=level, peer=peer[:8], code=error.code, failures=failures, why=why)
            if failures >= attempts:
                _add(error, f"; gave up after {failures} failures, before: ", tried)
                raise
            tried[peer[:8]] = error.message


def _add(error: Error, words: str, tried: Mapping[str, str]) -> None:
    """Say in an error what was tried before it."""
    if tried:
        error.message += words + "; ".join(f"{peer}: {message}" for peer, message in tried.items())
        error.args = (error.message,)

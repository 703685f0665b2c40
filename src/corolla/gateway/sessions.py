"""Sessions that are kept on servers between the turns of chats, so that a turn sends only what is new.

Owns the sessions that nobody uses at the moment. Any number of threads may use it at once.
"""

# B batch (always 1), P stored positions

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from corolla.client import GenerationSession
from corolla.gateway.catalog import Offer
from corolla.gateway.config import GatewayConfig

__all__ = ["KeptSessions"]


@dataclass(frozen=True, slots=True)
class _Kept:
    owner: str
    offer: str
    session: GenerationSession
    since_s: float


class KeptSessions:
    """The sessions between turns: of each owner for itself, and the longest unused goes first.

    Args:
        config: How many are kept, and for how long.
    """

    def __init__(self, config: GatewayConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._kept: list[_Kept] = []  # the longest unused first
        self._is_closed = False

    def __len__(self) -> int:
        with self._lock:
            return len(self._kept)

    def take(self, owner: str, offer: Offer, tokens: Sequence[int], room_tokens: int) -> GenerationSession:
        """Take the session that knows most of a prompt, or begin one.

        One that would lose more than half of what it knows is left for the chat that it belongs to.

        Args:
            owner: Whose sessions to look at.
            offer: Which model's.
            tokens: The prompt.
            room_tokens: How long a new one may get.

        Returns:
            The session, rewound to what the two have in common; close it or give it back.
        """
        self.drop_old()
        with self._lock:
            best, best_tokens = None, 0
            for kept in self._kept:
                if (kept.owner, kept.offer) == (owner, offer.name):
                    shared = _shared(kept.session, tokens)
                    needed = min(kept.session.position, len(tokens) - 1) / 2
                    if shared > max(best_tokens, needed):
                        best, best_tokens = kept, shared
            if best is not None:
                self._kept.remove(best)
        if best is None:
            session: GenerationSession = offer.model.session(min(room_tokens, offer.context_tokens))
            return session
        best.session.position = min(best_tokens, len(tokens) - 1)
        return best.session

    def give(self, owner: str, offer: Offer, session: GenerationSession) -> None:
        """Keep a session for the next turn.

        Args:
            owner: Whose it is.
            offer: Of which model.
            session: The session; it is not to be used any more.
        """
        if session.position:
            session.trace.forget()  # a chat's session may go on for days, and remembers each step
        with self._lock:
            if not self._is_closed:
                self._kept.append(_Kept(owner, offer.name, session, time.monotonic()))
                session = None  # type: ignore[assignment]
            surplus = self._kept[: max(0, len(self._kept) - self._config.kept_sessions)]
            del self._kept[: len(surplus)]
        for one in surplus:
            one.session.close()
        if session is not None:
            session.close()

    def drop_old(self) -> None:
        """End the sessions that were not used for too long."""
        self._drop(time.monotonic() - self._config.kept_s)

    def drop_all(self) -> bool:
        """End all of them, as when servers need the room; say whether there were any."""
        return self._drop(time.monotonic())

    def close(self) -> None:
        """End all of them, and those that are given back from now on."""
        with self._lock:
            self._is_closed = True
        self.drop_all()

    def _drop(self, before_s: float) -> bool:
        with self._lock:
            dropped = [kept for kept in self._kept if kept.since_s <= before_s]
            self._kept = [kept for kept in self._kept if kept.since_s > before_s]
        for kept in dropped:
            kept.session.close()
        return bool(dropped)


def _shared(session: GenerationSession, tokens: Sequence[int]) -> int:
    """Count the tokens with which both begin."""
    stored = session.tokens_BP[0] if len(session.tokens_BP) else session.tokens_BP.flatten()
    length = min(len(stored), len(tokens))
    differs = stored[:length] != torch.tensor(tokens[:length], dtype=stored.dtype)
    return int(differs.float().argmax()) if bool(differs.any()) else length

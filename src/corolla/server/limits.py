"""What one peer may have of a server, so that no flood of its sessions shuts the others out. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from corolla.cache import PAGE_TOKENS, pages_for
from corolla.engine import Engine, SessionRows
from corolla.errors import PeerBusy
from corolla.wire import OpenSession

__all__ = ["PeerLimits"]

_AGAIN_S = 2.0


@dataclass(frozen=True, slots=True)
class PeerLimits:
    """What one peer may have.

    Args:
        sessions: How many sessions.
        kv_share: How much of the KV tokens its sessions may have together, if they are several; from 0 to 1.
    """

    sessions: int = 64
    kv_share: float = 0.5

    def check(self, open_now: Sequence[SessionRows], opening: OpenSession, engine: Engine) -> None:
        """Check that a peer may have one more session.

        Args:
            open_now: What it has.
            opening: What it asks for.
            engine: Where.

        Raises:
            PeerBusy: If it may not before it has closed others.
        """
        if len(open_now) >= self.sessions:
            raise PeerBusy(
                f"{len(open_now)} sessions of yours are open here, which is the limit for one peer; close some, or ask "
                "another server",
                retry_after_s=_AGAIN_S,
            )
        held = sum(rows.lease.claim_pages for rows in open_now)
        more = opening.rows * pages_for(opening.max_tokens)
        if open_now and held + more > self.kv_share * engine.kv_pages:
            raise PeerBusy(
                f"{len(open_now)} sessions of yours hold {held * PAGE_TOKENS} KV tokens here, and {more * PAGE_TOKENS} "
                f"more would be over {self.kv_share:.0%} of the {engine.kv_pages * PAGE_TOKENS} that there are; close "
                "some, or ask another server",
                retry_after_s=_AGAIN_S,
            )

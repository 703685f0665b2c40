"""What one peer may have of a server, so that no flood of its sessions shuts the others out. Pure.

A peer that is alone may have everything: it may be a gateway, which is one client for many people. In company it has
its share, and what it has beyond that yields to whoever comes: a session that yields is replayed when it goes on.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from corolla.cache import PAGE_TOKENS
from corolla.errors import PeerBusy
from corolla.terms import PeerId

__all__ = ["Holding", "PeerLimits", "Sharing"]

Sharing = Literal["client", "all", "nobody"]
"""Who may share what sessions begin with: those of one client, all, or none."""

_AGAIN_S = 2.0
_SILENT_S = 2.0
"""A session yields when it has been silent for so long: not between two tokens of an answer."""


class Holding(NamedTuple):
    """What a session holds.

    Args:
        peer: Whose it is.
        pages: How many KV pages it may fill.
        silent_s: How long it has waited for a step.
    """

    peer: PeerId
    pages: int
    silent_s: float


@dataclass(frozen=True, slots=True)
class PeerLimits:
    """What one peer may have while others have sessions as well.

    Args:
        sessions: How many sessions.
        kv_share: How much of the KV tokens its sessions may have together, if they are several; from 0 to 1.
        sharing: With whose sessions its own may have in common what they begin with.
    """

    sessions: int = 64
    kv_share: float = 0.5
    sharing: Sharing = "client"

    def scope(self, peer: PeerId, adapters: Sequence[bytes]) -> bytes | None:
        """Say with whom a session may have in common what both begin with.

        Args:
            peer: Whose it is.
            adapters: What is added to each of its blocks.

        Returns:
            The same for those who may; ``None`` for nobody.
        """
        if self.sharing == "nobody":
            return None
        who = peer if self.sharing == "client" else ""
        return b":".join([who.encode(), *adapters])

    def check(self, peer: PeerId, more_pages: int, holdings: Sequence[Holding], all_pages: int) -> None:
        """Check that a peer may have one more session.

        Args:
            peer: Who asks.
            more_pages: For how much.
            holdings: What all sessions hold.
            all_pages: How much there is.

        Raises:
            PeerBusy: If it may not before it has closed others.
        """
        own = [one.pages for one in holdings if one.peer == peer]
        if len(own) in (0, len(holdings)):
            return
        if len(own) >= self.sessions:
            raise PeerBusy(
                f"{len(own)} sessions of yours are open here, which is the limit for one peer while others have some; "
                "close some, or ask another server",
                retry_after_s=_AGAIN_S,
            )
        if sum(own) + more_pages > self.kv_share * all_pages:
            raise PeerBusy(
                f"{len(own)} sessions of yours hold {sum(own) * PAGE_TOKENS} KV tokens here, and "
                f"{more_pages * PAGE_TOKENS} more would be over {self.kv_share:.0%} of the {all_pages * PAGE_TOKENS} "
                "that there are, the limit for one peer while others have sessions; close some, or ask another server",
                retry_after_s=_AGAIN_S,
            )

    def find_yielding(self, peer: PeerId, holdings: Sequence[Holding], all_pages: int) -> int | None:
        """Choose the session that yields to a peer for which there is no room.

        It is the one longest silent of whoever else has most, if that is several sessions and more than its share.

        Args:
            peer: Who asks.
            holdings: What all sessions hold.
            all_pages: How much there is.

        Returns:
            Its index among the holdings; ``None`` if none has to.
        """
        pages, sessions = Counter[PeerId](), Counter(one.peer for one in holdings)
        for one in holdings:
            pages[one.peer] += one.pages
        greedy = [one for one in pages if one != peer and sessions[one] > 1 and pages[one] > self.kv_share * all_pages]
        silent = [
            (one.silent_s, index)
            for index, one in enumerate(holdings)
            if one.peer in greedy and one.silent_s >= _SILENT_S
        ]
        return max(silent)[1] if silent else None

"""Which peers to keep away from, and until when. Pure: the time is an argument."""

from corolla.terms import PeerId

__all__ = ["Bans"]

_LONGEST_S = 3600.0


class Bans:
    """Time-limited refusals to route to peers. A peer that fails again right after its ban is banned twice as long."""

    def __init__(self) -> None:
        self._until_s: dict[PeerId, float] = {}
        self._length_s: dict[PeerId, float] = {}

    def ban(self, peer: PeerId, for_s: float, now_s: float) -> None:
        """Ban a peer.

        Args:
            peer: Whom.
            for_s: For how long, the first time; 0 does nothing.
            now_s: The present, on the caller's monotonic clock.
        """
        if for_s > 0:
            length_s = min(max(for_s, 2 * self._length_s.get(peer, 0.0)), max(_LONGEST_S, for_s))
            self._length_s[peer] = length_s
            self._until_s[peer] = now_s + length_s

    def forgive(self, peer: PeerId) -> None:
        """Forget a peer's failures, because it has just succeeded."""
        self._until_s.pop(peer, None)
        self._length_s.pop(peer, None)

    def banned(self, now_s: float) -> frozenset[PeerId]:
        """List the peers that are banned now."""
        return frozenset(peer for peer, until_s in self._until_s.items() if until_s > now_s)

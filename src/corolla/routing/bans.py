"""Which peers to keep away from, and until when. Pure: the time is an argument."""

from collections.abc import Iterable
from typing import NamedTuple

from corolla.terms import PeerId

__all__ = ["Bans"]

_LONGEST_S = 3600.0
_PROBE_S = 15.0
"""For how long whoever tries a peer after its ban has it alone, unless it is known sooner how that went."""


class _Ban(NamedTuple):
    until_s: float
    length_s: float
    probed_until_s: float = 0.0


class Bans:
    """Time-limited refusals to route to peers.

    When a ban ends, the first use of the peer is a probe: until it has succeeded or failed, nobody else uses the peer.

    A peer that fails again soon after its ban, within as long as it lasted, is banned twice as long, up to an hour.
    Failures during a ban are taken for the same one: many requests may notice it.
    """

    def __init__(self) -> None:
        self._bans: dict[PeerId, _Ban] = {}

    def ban(self, peer: PeerId, for_s: float, now_s: float) -> None:
        """Ban a peer.

        Args:
            peer: Whom.
            for_s: For how long, the first time; 0 does nothing.
            now_s: The present, on the caller's monotonic clock.
        """
        if for_s <= 0:
            return
        last = self._bans.get(peer)
        length_s = for_s
        if last is not None and now_s < last.until_s:
            length_s = max(for_s, last.length_s)
            self._bans[peer] = _Ban(max(last.until_s, now_s + for_s), length_s)
            return
        if last is not None and now_s < last.until_s + last.length_s:
            length_s = max(for_s, min(2 * last.length_s, _LONGEST_S))
        self._bans[peer] = _Ban(now_s + length_s, length_s)

    def use(self, peers: Iterable[PeerId], now_s: float) -> None:
        """Say that peers are about to be used; for those whose ban is over, it is the probe.

        Args:
            peers: Whom.
            now_s: The present.
        """
        for peer in peers:
            ban = self._bans.get(peer)
            if ban is not None and ban.until_s <= now_s:
                self._bans[peer] = ban._replace(probed_until_s=now_s + _PROBE_S)

    def forgive(self, peer: PeerId) -> None:
        """Forget a peer's failures, because it has just succeeded."""
        self._bans.pop(peer, None)

    def banned(self, now_s: float) -> frozenset[PeerId]:
        """List the peers that are banned or probed now; failures too old to count are forgotten."""
        self._bans = {
            peer: ban for peer, ban in self._bans.items() if now_s < max(ban.until_s + ban.length_s, ban.probed_until_s)
        }
        return frozenset(peer for peer, ban in self._bans.items() if now_s < ban.until_s or now_s < ban.probed_until_s)

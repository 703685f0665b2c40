"""How long a message takes to a peer and back, measured and smoothed. Knows nothing of what the numbers are for."""

from collections.abc import Mapping, Sequence
from typing import Final

import anyio

from corolla.swarm.endpoint import Endpoint
from corolla.terms import Address, PeerId
from corolla.wire import Ping, Pong

__all__ = ["Pings"]

_BULK_BYTES: Final = 1 << 20
_CLOCK_S: Final = 1e-6  # a coarse clock may not have ticked
_WEIGHT: Final = 0.25
"""Of a new measurement in the average; the round-trip estimate of TCP uses 1/8 (RFC 6298), with far more of them."""


class Pings:
    """Round-trip times to peers, as an exponential moving average.

    Args:
        endpoint: How to reach them.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._rtts_s: dict[PeerId, float] = {}

    @property
    def rtts_s(self) -> Mapping[PeerId, float]:
        """The smoothed round-trip times to all peers that were measured, in seconds."""
        return self._rtts_s

    def rtt_s(self, peer: PeerId) -> float | None:
        """Give the smoothed round-trip time to a peer, in seconds; ``None`` if it was never measured."""
        return self._rtts_s.get(peer)

    async def ping(self, peer: PeerId, addresses: Sequence[Address]) -> float:
        """Measure the round trip on an open channel, so without the time it takes to open one.

        Args:
            peer: To whom.
            addresses: Where it is.

        Returns:
            This one measurement, in seconds.

        Raises:
            PeerUnreachable: If it cannot be dialled.
            PeerTimeout: If it does not answer in time.
            Error: What else can go wrong with a request.
        """
        async with self._endpoint.channel(peer, addresses) as channel:
            begin_s = anyio.current_time()
            await channel.request(Ping(), expected=Pong, deadline_s=self._endpoint.config.request_s)
            rtt_s = anyio.current_time() - begin_s
        known_s = self._rtts_s.pop(peer, rtt_s)
        self._rtts_s[peer] = known_s + _WEIGHT * (rtt_s - known_s)
        if len(self._rtts_s) > self._endpoint.config.max_peers:
            del self._rtts_s[next(iter(self._rtts_s))]  # the one measured longest ago
        return rtt_s

    async def bandwidth(self, peer: PeerId, addresses: Sequence[Address]) -> float:
        """Measure how fast a mebibyte gets to a peer, on an open channel. It is more than that on longer messages.

        Args:
            peer: To whom.
            addresses: Where it is.

        Returns:
            Bytes a second, beyond the round trip that every message takes; at most twice what was seen with it, since a
            round trip varies.

        Raises:
            Error: As :meth:`ping`.
        """
        rtt_s = await self.ping(peer, addresses)
        async with self._endpoint.channel(peer, addresses) as channel:
            begin_s = anyio.current_time()
            await channel.request(
                Ping(), [bytes(_BULK_BYTES)], expected=Pong, deadline_s=self._endpoint.config.request_s
            )
            elapsed_s = anyio.current_time() - begin_s
        return _BULK_BYTES / max(elapsed_s - rtt_s, elapsed_s / 2, _CLOCK_S)

"""What a client learns of servers by using them, which overrides what they claim. Pure: the time is an argument."""

from collections.abc import Mapping
from typing import NamedTuple

from msgspec import structs

from corolla.routing.costs import Measured
from corolla.terms import PeerId, Snapshot

__all__ = ["Experience", "Work"]

_WEIGHT = 0.25
"""Of a new measurement in the average."""
_KEPT_S = 600.0
"""How long what was measured counts; then a server gets another chance to be what it claims."""
_QUEUE_HALVED_S = 30.0
"""A queue that was met is believed to be half as long after so much time."""
_LIVE_S = 5.0
"""How long a server's word on its load counts for more than its announcement, which is refreshed this often."""
_MOST_PEERS = 4096
_BANDWIDTH_BYTES = 1 << 16
"""Fewer bytes tell nothing about bandwidth."""


class Work(NamedTuple):
    """What a server did for this client, and where the time went.

    Args:
        blocks: How many blocks it ran.
        tokens: How many tokens, over all rows.
        is_decode: Whether it was one token a row.
        nbytes: How many bytes went there and back.
        total_s: From sending to having the answer, by the client's own clock; where outputs are pushed, from hearing of
            the hop before to hearing of this one. ``None`` if that was disturbed.
        queue_s: For how long the work waited there, as the server says.
        compute_s: How long it took to compute, as the server says.
        is_pushed: Whether its input came from another server.
        load: What it says of its free KV tokens and of its open sessions at the moment, if it does.
    """

    blocks: int
    tokens: int
    is_decode: bool
    nbytes: int
    total_s: float | None
    queue_s: float
    compute_s: float
    is_pushed: bool = False
    load: tuple[int, int] | None = None


class _Met(NamedTuple):
    measured: Measured
    at_s: float


class _Live(NamedTuple):
    free_tokens: int
    sessions: int
    at_s: float


class Experience:
    """Averages, by peer, of what its work has taken.

    A server that says less of its computing than is true gains nothing: the sum is the client's own, and what the
    server does not account for counts as its network. Where outputs are pushed, a single token can be no longer on its
    way than by the client, which is the round trip of a ping; what takes longer counts as computing.
    """

    def __init__(self) -> None:
        self._met: dict[PeerId, _Met] = {}
        self._live: dict[PeerId, _Live] = {}

    def note(self, peer: PeerId, work: Work, now_s: float, ping_s: float | None = None) -> None:
        """Take a piece of work into account.

        Args:
            peer: Who did it.
            work: What it was, and how long it took.
            now_s: The present, on the caller's monotonic clock.
            ping_s: The round trip of a ping to it.
        """
        known = self._met.pop(peer, _Met(Measured(), now_s)).measured
        queue_s, compute_s, network_s = work.queue_s, work.compute_s, None
        if work.is_pushed and work.is_decode and work.total_s is not None and ping_s is not None:
            compute_s = max(compute_s, work.total_s - queue_s - ping_s)
        elif work.total_s is not None and not work.is_pushed:
            queue_s = min(queue_s, work.total_s)
            compute_s = min(compute_s, work.total_s - queue_s)
            network_s = work.total_s - queue_s - compute_s
        rtt_s, decode_s, prefill_s = known.rtt_s, known.decode_block_s, known.prefill_block_s
        bytes_per_s = known.bytes_per_s
        if work.is_decode:
            rtt_s = rtt_s if network_s is None else _average(rtt_s, network_s)
            decode_s = _average(decode_s, compute_s / work.blocks)
        else:
            prefill_s = _average(prefill_s, compute_s / (work.blocks * work.tokens))
            sending_s = (network_s or 0.0) - (rtt_s or 0.0)
            if work.nbytes >= _BANDWIDTH_BYTES and sending_s > 0:
                bytes_per_s = 1 / _average(bytes_per_s and 1 / bytes_per_s, sending_s / work.nbytes)
        measured = Measured(rtt_s, _average(known.queue_s, queue_s), decode_s, prefill_s, bytes_per_s)
        self._met[peer] = _Met(measured, now_s)
        if work.load is not None:
            self._live[peer] = _Live(*work.load, now_s)
        if len(self._met) > _MOST_PEERS:
            del self._met[next(iter(self._met))]  # the one used longest ago

    def forget_load(self, peer: PeerId) -> None:
        """Forget what a peer has said of its load, because that has changed."""
        self._live.pop(peer, None)

    def freshen(self, snapshot: Snapshot, now_s: float) -> Snapshot:
        """Put what servers have just said of their load in the place of what they had announced.

        Args:
            snapshot: What they had announced.
            now_s: The present.
        """
        self._live = {peer: live for peer, live in self._live.items() if now_s - live.at_s < _LIVE_S}
        if not self._live:
            return snapshot
        announcements = tuple(
            structs.replace(one, free_tokens=live.free_tokens, sessions=live.sessions)
            if (live := self._live.get(one.peer))
            else one
            for one in snapshot.announcements
        )
        return structs.replace(snapshot, announcements=announcements)

    def known(self, rtts_s: Mapping[PeerId, float], now_s: float) -> dict[PeerId, Measured]:
        """Give what is known of peers.

        Args:
            rtts_s: Round trips of pings; they count where no work tells.
            now_s: The present.
        """
        self._met = {peer: met for peer, met in self._met.items() if now_s - met.at_s < _KEPT_S}
        found = {peer: Measured(rtt_s=rtt_s) for peer, rtt_s in rtts_s.items()}
        for peer, (measured, at_s) in self._met.items():
            queue_s = (measured.queue_s or 0.0) * 0.5 ** ((now_s - at_s) / _QUEUE_HALVED_S)
            rtt_s = rtts_s.get(peer) if measured.rtt_s is None else measured.rtt_s
            found[peer] = measured._replace(rtt_s=rtt_s, queue_s=queue_s)
        return found


def _average(known: float | None, new: float) -> float:
    return new if known is None else known + _WEIGHT * (new - known)

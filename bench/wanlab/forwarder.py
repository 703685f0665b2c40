"""What forwards packets where no compiler is at hand: the same as ``wancore.c``, slower, and explained there."""

import contextlib
import heapq
import itertools
import math
import os
import random
import select
import time
from collections.abc import Callable, Sequence

from bench.wanlab.table import Link, Table

__all__ = ["forward"]

_BATCH = 32


def forward(table: Table, tuns: Sequence[int], *, seed: int, stop: int) -> None:
    """Forward packets until ``stop`` is readable or hung up.

    Args:
        table: The settings.
        tuns: The access links.
        seed: Of loss and jitter.
        stop: A descriptor.
    """
    forwarder = _Forwarder(table, tuns, seed)
    clock, agenda = time.monotonic, forwarder.agenda
    while True:
        wait_s = agenda[0][0] - clock() if agenda else 1.0
        ready, _, _ = select.select([stop, *tuns], [], [], max(wait_s, 0))
        if stop in ready:
            return
        for tun in ready:
            with contextlib.suppress(BlockingIOError):
                for _ in range(_BATCH):
                    forwarder.send(tuns.index(tun), os.read(tun, 65536), clock())
        for _ in range(_BATCH):
            if agenda and agenda[0][0] <= (now := clock()):
                due, _, action, to, data = heapq.heappop(agenda)
                action(to, data, due, now)


class _Line:
    """One direction of an access link: when it falls idle, and the noise of its delay."""

    def __init__(self) -> None:
        self._idle = self._noise_at = self._noise = 0.0

    def transmit(self, size: int, mbit: float, queue_ms: float, now: float) -> float:
        """Give when a packet will have left; 0 if the queue before it is full."""
        start = max(self._idle, now) if mbit else now
        if (start - now) * 1e3 > queue_ms:
            return 0.0
        self._idle = start + (size * 8e-6 / mbit if mbit else 0.0)
        return self._idle

    def jitter(self, sigma: float, now: float, gauss: float) -> float:
        keep = math.exp((self._noise_at - now) / 20e-3)
        self._noise = keep * self._noise + math.sqrt(1 - keep * keep) * gauss
        self._noise_at = now
        return sigma * self._noise


_Action = Callable[[int, bytes, float, float], None]


class _Forwarder:
    def __init__(self, table: Table, tuns: Sequence[int], seed: int) -> None:
        self._table = table
        self._tuns = tuns
        self._links = list(table.links)
        self._ups, self._downs = ([_Line() for _ in tuns] for _ in range(2))
        self._arrivals = [[0.0] * len(tuns) for _ in tuns]  # the latest on each path, whose packets stay in order
        self._order, self._chance = itertools.count(), random.Random(seed)
        self.agenda: list[tuple[float, int, _Action, int, bytes]] = []

    def send(self, source: int, data: bytes, now: float) -> None:
        """Put a packet on its path, or drop it."""
        link, to = self._links[source], self._find(data)
        link.tx_packets += 1
        link.tx_bytes += len(data)
        if to is None:
            self._table.head.unroutable += 1
            return
        there, path = self._links[to], self._table.routes[source][to]
        if not link.up or path.cut:
            link.cut += 1
        elif self._is_lost(link.loss) or self._is_lost(path.loss):
            link.lost += 1
        elif left := self._ups[source].transmit(len(data), link.up_mbit, link.queue_ms, now):
            hold_ms = link.delay_ms + path.delay_ms + there.delay_ms + self._jitter_ms(source, to, now)
            due = max(left, left + hold_ms / 1e3, self._arrivals[source][to])
            self._arrivals[source][to] = due
            self._plan(due, self._queue, to, data)
        else:
            link.overflowed += 1

    def _find(self, data: bytes) -> int | None:
        """Give whose link has the address that an IPv4 packet is for."""
        if data[0] >> 4 != 4:
            return None
        wanted = int.from_bytes(data[16:20], "big")
        return next((number for number, link in enumerate(self._links) if link.addr == wanted), None)

    def _jitter_ms(self, source: int, to: int, now: float) -> float:
        link, there = self._links[source], self._links[to]
        if not (link.jitter_ms or there.jitter_ms):
            return 0.0
        here_ms = self._ups[source].jitter(link.jitter_ms, now, self._chance.gauss())
        return here_ms + self._downs[to].jitter(there.jitter_ms, now, self._chance.gauss())

    def _is_lost(self, percent: float) -> bool:
        return bool(percent) and self._chance.random() * 100 < percent

    def _plan(self, due: float, action: _Action, to: int, data: bytes) -> None:
        heapq.heappush(self.agenda, (due, next(self._order), action, to, data))

    def _queue(self, to: int, data: bytes, due: float, now: float) -> None:
        link = self._links[to]
        if not link.up:
            link.cut += 1
        elif self._is_lost(link.loss):
            link.lost += 1
        elif left := self._downs[to].transmit(len(data), link.down_mbit, link.queue_ms, due):
            self._plan(left, self._deliver, to, data)
        else:
            link.overflowed += 1

    def _deliver(self, to: int, data: bytes, due: float, now: float) -> None:
        self._write(self._links[to], self._tuns[to], data)
        head, late_us = self._table.head, int((now - due) * 1e6)
        head.delivered += 1
        head.late += late_us >= 1000
        head.worst_late_us = max(head.worst_late_us, late_us)

    @staticmethod
    def _write(link: Link, tun: int, data: bytes) -> None:
        with contextlib.suppress(OSError):
            link.rx_bytes += os.write(tun, data)
            link.rx_packets += 1

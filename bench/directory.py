"""What the directory costs each server, and how soon all hear of a change: 100 and 1,000 servers under simulated time.

The code is that of real servers, and bytes are counted as on TLS over TCP over IP. In the larger swarms only some of
them announce themselves, and what is said of those is multiplied: each announcement travels by itself.
"""

import statistics
import time
from typing import Final

from bench.report import Row, write_report
from corolla.testing import SimulatedSwarm

__all__ = ["main"]

SWARMS: Final = {100: (100, 10.0), 1000: (50, 5.0)}
"""Servers to those that announce themselves, and for how long they talk before and while they are measured."""
CHANGES: Final = 2
KNOWN_S: Final = 2.0
"""Within this, everybody should know."""


def main() -> None:
    """Simulate all swarms and print the table."""
    rows: list[Row] = []
    for servers, (tracked, measured_s) in SWARMS.items():
        rows += measure(servers, tracked, measured_s)
        write_report("directory", rows, "what one server sends to keep the directory, and how soon a change is known")


def measure(servers: int, tracked: int, measured_s: float) -> list[Row]:
    """Let a swarm that knows itself talk for a while, then let some of its servers change.

    Args:
        servers: How many there are.
        tracked: How many of them announce themselves.
        measured_s: For how long they talk, before and while they are measured.
    """
    began_s = time.perf_counter()
    swarm = SimulatedSwarm(servers, tracked=tracked, seed=servers)
    swarm.run(0.001)
    swarm.acquaint()
    swarm.run(measured_s)
    for server in swarm.servers:
        server.traffic.said = server.traffic.spent = 0
    swarm.run(measured_s)
    said = [server.traffic.said * swarm.share / measured_s for server in swarm.servers]
    spent = [server.traffic.spent / measured_s for server in swarm.servers]
    total = sorted(one + other for one, other in zip(said, spent, strict=True))
    arrivals_s, missed = spread(swarm)
    name = f"{servers} servers"
    return [
        Row(f"{name}: sent by one, mean", statistics.mean(total) / 1000, "kB/s"),
        Row(f"{name}: of it announcements", statistics.mean(said) / 1000, "kB/s"),
        Row(f"{name}: sent by one, 99th percentile", total[int(0.99 * len(total))] / 1000, "kB/s"),
        Row(f"{name}: a change is known, median", statistics.median(arrivals_s), "s"),
        Row(f"{name}: 99th percentile", arrivals_s[int(0.99 * len(arrivals_s))], "s"),
        Row(f"{name}: to the last", arrivals_s[-1], "s"),
        Row(f"{name}: never", missed, ""),
        Row(f"{name}: simulated in", time.perf_counter() - began_s, "s"),
    ]


def spread(swarm: SimulatedSwarm) -> tuple[list[float], int]:
    """Let some servers change one after the other.

    Returns:
        How long it took until each of the others knew, in order; and how many did not hear of it.
    """
    arrivals_s: list[float] = []
    missed = 0
    for server in swarm.servers[:CHANGES]:
        changed_s = swarm.now_s
        if not swarm.change(server, sessions=8):
            raise RuntimeError("a change that matters was not told at once")
        record_id = swarm.watch(server)
        swarm.run(KNOWN_S)
        arrivals_s += [at_s - changed_s for at_s in swarm.arrivals[record_id]]
        missed += len(swarm.servers) - 1 - len(swarm.arrivals[record_id])
    return sorted(arrivals_s), missed

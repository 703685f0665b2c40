"""How near small swarms come to the best placement that there is, which a solver of integer programs finds.

The bound of ``bench/balance.py`` lets servers be divided over spans. In small swarms that is more than any placement
can have; here the best real one is what counts.
"""

import random
import statistics
from collections.abc import Sequence
from typing import Any, Final

import highspy

from bench.balance import join
from bench.report import Row, write_report
from corolla.routing import Sizes
from corolla.testing.balance import SimulatedSwarm

__all__ = ["best_throughput", "main"]

SERVERS, BLOCKS, SWARMS = 10, 32, 6
SETTLED_S: Final = 5400.0
SOLVE_S: Final = 10.0


def main() -> None:
    """Let swarms settle, solve for the best placement of the same servers, and print the table."""
    sizes = [100] * BLOCKS
    of_found: list[float] = []
    of_excluded: list[float] = []
    found_of_bound: list[float] = []
    for seed in range(SWARMS):
        rng = random.Random(seed * 1000 + SERVERS)
        swarm = SimulatedSwarm(sizes, rng)
        for _ in range(SERVERS):
            join(swarm, BLOCKS, rng, is_loaded=True)
            swarm.run(2.5)
        swarm.run(SETTLED_S)
        found, excluded = best_throughput(sizes, [(one.power, one.room_bytes) for one in swarm.servers.values()])
        of_found.append(swarm.throughput / found)
        of_excluded.append(swarm.throughput / excluded)
        found_of_bound.append(found / swarm.bound)
    name = f"{SERVERS} servers, {BLOCKS} blocks"
    rows = [
        Row(f"{name}: of the best placement found, mean of {SWARMS} swarms", statistics.mean(of_found), ""),
        Row(f"{name}: the least of them", min(of_found), ""),
        Row(f"{name}: of what the solver could not exclude, mean", statistics.mean(of_excluded), ""),
        Row(f"{name}: the best placement found, of the bound, mean", statistics.mean(found_of_bound), ""),
    ]
    write_report("optimum", rows, "throughput of the weakest block as a share of the best placement's")


def best_throughput(sizes: Sequence[int], servers: Sequence[tuple[float, int]]) -> tuple[float, float]:
    """Find the throughput of the weakest block if each server takes the best of its spans.

    Args:
        sizes: The bytes of each block.
        servers: The power and the room in bytes of each.

    Returns:
        That of the best placement found, and what the solver has proved that none exceeds; they differ by up to 0.2 %,
        or more if its time was over.
    """
    blocks = Sizes(sizes)
    solver = highspy.Highs()
    solver.silent()
    solver.setOptionValue("time_limit", SOLVE_S)
    solver.setOptionValue("mip_rel_gap", 0.002)
    throughput = solver.addVariable(lb=0)
    rates: list[list[Any]] = [[] for _ in sizes]
    for power, room_bytes in servers:
        choices = []
        for start, stop, size in blocks.windows(room_bytes):
            choices.append(solver.addBinary())
            for block in range(start, stop):
                rates[block].append(power / size * choices[-1])
        solver.addConstr(solver.qsum(choices) == 1)
    for rate in rates:
        solver.addConstr(solver.qsum(rate) >= throughput)
    solver.maximize(throughput)
    solved = solver.getInfo()
    return float(solved.objective_function_value), float(solved.mip_dual_bound)


if __name__ == "__main__":
    main()

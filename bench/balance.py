"""How well servers that decide alone balance a swarm: simulated swarms of 10 to 10,000 servers under churn, with plots.

Speeds differ tenfold and spans hold 1 to 80 blocks. Half of the servers die and are replaced within an hour; then a
third dies at once. What the servers decide, they decide by the functions that ``corolla serve`` calls.
"""

import math
import random
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.report import Row, write_report
from corolla.routing import plan_moves
from corolla.terms import Snapshot
from corolla.testing.balance import Pace, SimulatedSwarm

__all__ = ["main"]

IMAGE = Path(__file__).parent.parent / "docs" / "images" / "balance.png"
SWARMS = {10: 32, 100: 80, 1000: 80, 10_000: 128}
"""Servers to blocks."""
LONGEST = 80
CHURN_H, CALM_H = 1.0, 1.0
SAMPLE_S = 300.0
MANY = 10_000
"""So many servers join fifty at a time, and look less often: else it takes hours."""
AT_ONCE = 50
THIRD = 1 / 3


@dataclass
class Course:
    """What happened to one swarm."""

    servers: int
    blocks: int
    hours: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    moves: list[int] = field(default_factory=list)
    holes_opened: int = 0
    plan_ms: float = 0.0
    simulated_in_s: float = 0.0


def main() -> None:
    """Simulate all swarms, print the table, draw the plots."""
    with ProcessPoolExecutor(2) as pool:
        courses = list(pool.map(follow, SWARMS.keys(), SWARMS.values()))
    rows: list[Row] = []
    for course in courses:
        churned = [
            share for hour, share in zip(course.hours, course.shares, strict=True) if CHURN_H / 4 <= hour < CHURN_H
        ]
        after = [share for hour, share in zip(course.hours, course.shares, strict=True) if hour >= CHURN_H]
        late = [index for index, hour in enumerate(course.hours) if hour > CHURN_H + CALM_H - 0.25]
        name = f"{course.servers} servers, {course.blocks} blocks"
        rows += [
            Row(f"{name}: throughput of the bound, mean under churn", sum(churned) / len(churned), ""),
            Row(f"{name}: the least after a third died", min(after), ""),
            Row(f"{name}: in the end", course.shares[-1], ""),
            Row(f"{name}: moves in all", course.moves[-1], ""),
            Row(f"{name}: moves in the last quarter", course.moves[-1] - course.moves[late[0]], ""),
            Row(f"{name}: blocks left alone by a move", course.holes_opened, ""),
            Row(f"{name}: one decision", course.plan_ms, "ms"),
            Row(f"{name}: simulated in", course.simulated_in_s, "s"),
        ]
    write_report("balance", rows, "throughput of the weakest block as a share of what no placement could exceed")
    draw(courses)


def follow(servers: int, blocks: int) -> Course:
    """Let a swarm grow, churn, lose a third, and settle."""
    began_s = time.perf_counter()
    rng = random.Random(servers)
    course = Course(servers, blocks)
    is_vast = servers >= MANY
    pace = Pace(spread_s=10.0, look_s=30.0) if is_vast else Pace()
    swarm = SimulatedSwarm([100] * blocks, rng, pace=pace)
    for number in range(servers):
        join(swarm, blocks, rng, is_loaded=True)
        if not is_vast or number % AT_ONCE == 0:
            swarm.run(pace.spread_s if is_vast else 2.5)
    started_s, next_death_s = swarm.now_s, swarm.now_s
    mean_s = CHURN_H * 3600.0 / (servers / 2)
    while swarm.now_s < started_s + CHURN_H * 3600.0:
        sample(swarm, course, started_s)
        until_s = swarm.now_s + SAMPLE_S
        while next_death_s < until_s:
            swarm.run(max(0.0, next_death_s - swarm.now_s))
            swarm.kill(rng.choice(swarm.online))
            join(swarm, blocks, rng)
            next_death_s += rng.expovariate(1 / mean_s)
        swarm.run(until_s - swarm.now_s)
    for server in rng.sample(swarm.online, round(len(swarm.online) * THIRD)):
        swarm.kill(server)
    for _ in range(round(CALM_H * 3600.0 / SAMPLE_S) + 1):
        sample(swarm, course, started_s)
        swarm.run(SAMPLE_S)
    course.holes_opened = swarm.holes_opened
    course.simulated_in_s = time.perf_counter() - began_s
    claims = tuple(server.claim for server in swarm.servers.values())
    begun_s = time.perf_counter()
    plan_moves(Snapshot(announcements=claims), claims[0].model, [100] * blocks)
    course.plan_ms = 1e3 * (time.perf_counter() - begun_s)
    return course


def join(swarm: SimulatedSwarm, blocks: int, rng: random.Random, *, is_loaded: bool = False) -> None:
    """Let a server of any speed and size join."""
    swarm.join(100 * 10 ** rng.uniform(0, 1), 100 * rng.randint(1, min(LONGEST, blocks)), is_loaded=is_loaded)


def sample(swarm: SimulatedSwarm, course: Course, started_s: float) -> None:
    """Note how the swarm is doing."""
    course.hours.append((swarm.now_s - started_s) / 3600.0)
    course.shares.append(swarm.throughput / swarm.bound)
    course.moves.append(swarm.moves)


def draw(courses: list[Course]) -> None:
    """Draw throughput and moves over time."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    colours = ["#9aa7b1", "#5aa9a3", "#2f6f9f", "#c8553d"]
    with plt.rc_context({"font.size": 10.5, "font.family": "DejaVu Sans", "axes.spines.top": False}):
        figure, (upper, lower) = plt.subplots(
            2, 1, figsize=(9.2, 6.2), sharex=True, height_ratios=(3, 1.25), layout="constrained"
        )
        for course, colour in zip(courses, colours, strict=True):
            label = f"{course.servers:,} servers, {course.blocks} blocks"
            width = 1.3 if course.servers < 100 else 1.9
            upper.plot(course.hours, [100 * share for share in course.shares], color=colour, lw=width, label=label)
            per_server = [moves / course.servers for moves in course.moves]
            lower.plot(course.hours, [value - per_server[0] for value in per_server], color=colour, lw=width)
        for axes in (upper, lower):
            axes.axvline(CHURN_H, color="#555555", lw=0.9, ls=(0, (4, 3)))
            axes.grid(axis="y", color="#e6e6e6", lw=0.8)
            axes.set_axisbelow(True)
            axes.spines["right"].set_visible(False)
        decorate(upper, lower)
        IMAGE.parent.mkdir(exist_ok=True)
        figure.savefig(IMAGE, dpi=150)
        plt.close(figure)


def decorate(upper: Any, lower: Any) -> None:
    """Say what is shown."""
    upper.axhline(95, color="#bbbbbb", lw=0.9, ls=":")
    upper.set(ylim=(0, 103), ylabel="throughput, % of the bound")
    upper.set_title("Servers that decide alone keep a swarm balanced", loc="left", fontweight="bold", fontsize=12)
    upper.text(CHURN_H / 2, 4, "servers die and join: half of them in an hour", ha="center", color="#555555")
    upper.text(CHURN_H + 0.08, 4, "a third has died at once; then peace", color="#555555")
    upper.legend(loc="lower right", bbox_to_anchor=(1.0, 0.12), frameon=False)
    lower.set(ylabel="moves per server", xlabel="hours", xlim=(0, CHURN_H + CALM_H), ylim=(0, None))
    lower.set_xticks(range(math.ceil(CHURN_H + CALM_H) + 1))


if __name__ == "__main__":
    main()

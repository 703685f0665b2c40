"""A soak: clients speak while servers are killed, frozen and told to leave, for as long as one likes.

    python -m bench.chaos --minutes 60 --clients 20

Every text is compared with that of the undisturbed model. One server of each half of the model is spared; its size, and
that of the process with all clients, is compared between the second and the last quarter of the time. Fails if anything
is wrong, lost or left.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

from bench.report import Row, write_report
from corolla.testing import Chaos, ChaosPlan, Growth

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> None:
    """Run the soak, print the table, write the report."""
    parser = argparse.ArgumentParser(prog="python -m bench.chaos", description="A soak under disasters.")
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--replicas", type=int, default=3, help="servers of each half of the model, one of them spared")
    parser.add_argument("--every", type=float, default=20.0, help="seconds from one disaster to the next, on average")
    parser.add_argument("--frozen", type=float, default=5.0, help="seconds for which a server is frozen")
    parser.add_argument("--rest", type=float, default=5.0, help="seconds that a client rests after a text, on average")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args([] if arguments is None else arguments)
    torch.set_num_threads(1)
    plan = ChaosPlan(
        replicas=chosen.replicas,
        spared=1,
        clients=chosen.clients,
        run_s=60 * chosen.minutes,
        every_s=chosen.every,
        frozen_s=chosen.frozen,
        rest_s=chosen.rest,
        seed=chosen.seed,
    )
    with tempfile.TemporaryDirectory() as folder, Chaos(plan, Path(folder)) as chaos:
        report = chaos.run()
    rows = [
        *(Row(f"servers: {kind}", count, "") for kind, count in sorted(report.disasters.items())),
        Row("texts spoken", report.generations, ""),
        Row("replays", report.replays, ""),
        Row("wrong texts", len(report.wrong), ""),
        Row("clients that failed", len(report.failures), ""),
        Row("KV tokens not given back", report.lost_tokens, "tokens"),
    ]
    for who in ("clients", "server"):
        grown = [growth for name, growth in report.grown.items() if name.startswith(who)]
        for what in Growth._fields if grown else ():
            unit, scale = ("MiB", 1 << 20) if what == "memory_bytes" else ("", 1)
            name = f"{who}: {what.removesuffix('_bytes')} grown"
            rows.append(Row(name, max(getattr(growth, what) for growth in grown) / scale, unit))
    title = f"{chosen.minutes:g} minutes, {plan.clients} clients, {len(plan.spans) * plan.replicas} servers at a time"
    write_report("chaos", rows, title)
    if report.wrong or report.failures or report.lost_tokens:
        sys.exit("\n".join([*report.wrong, *report.failures, f"{report.lost_tokens} KV tokens lost"]))


if __name__ == "__main__":
    main(sys.argv[1:])

"""A soak: clients speak while servers are killed, frozen and told to leave, for as long as one likes.

    python -m bench.chaos --minutes 60 --clients 20

Every text is compared with that of the undisturbed model; memory, files and threads of the servers that stand to the
end are compared with those at the beginning. Fails if anything is wrong, lost or left.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

from bench.report import Row, write_report
from corolla.testing import Chaos, ChaosPlan

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> None:
    """Run the soak, print the table, write the report."""
    parser = argparse.ArgumentParser(prog="python -m bench.chaos", description="A soak under disasters.")
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--replicas", type=int, default=2, help="servers of each half of the model")
    parser.add_argument("--every", type=float, default=5.0, help="seconds of rest between two disasters, on average")
    parser.add_argument("--frozen", type=float, default=5.0, help="seconds for which a server is frozen")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args([] if arguments is None else arguments)
    torch.set_num_threads(1)
    plan = ChaosPlan(
        replicas=chosen.replicas,
        clients=chosen.clients,
        run_s=60 * chosen.minutes,
        every_s=chosen.every,
        frozen_s=chosen.frozen,
        seed=chosen.seed,
    )
    with tempfile.TemporaryDirectory() as folder, Chaos(plan, Path(folder)) as chaos:
        report = chaos.run()
    grown = [*report.grown.values()] or [(0, 0, 0)]
    rows = [
        *(Row(f"servers: {kind}", count, "") for kind, count in sorted(report.disasters.items())),
        Row("texts spoken", report.generations, ""),
        Row("replays", report.replays, ""),
        Row("wrong texts", len(report.wrong), ""),
        Row("clients that failed", len(report.failures), ""),
        Row("memory grown, the most of any server", max(size[0] for size in grown) / (1 << 20), "MiB"),
        Row("open files grown, the most of any server", max(size[1] for size in grown), ""),
        Row("threads grown, the most of any server", max(size[2] for size in grown), ""),
    ]
    title = f"{chosen.minutes:g} minutes, {plan.clients} clients, {len(plan.spans) * plan.replicas} servers at a time"
    write_report("chaos", rows, title)
    if report.wrong or report.failures:
        sys.exit("\n".join([*report.wrong, *report.failures]))


if __name__ == "__main__":
    main(sys.argv[1:])

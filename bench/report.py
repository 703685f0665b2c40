"""What a benchmark reports: numbers on the screen, and in ``bench/results`` together with the machine they hold for."""

import importlib.metadata
import json
import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.table import Table

__all__ = ["Row", "write_report"]

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers")


@dataclass(frozen=True)
class Row:
    """One number.

    Args:
        metric: What was measured.
        value: The number.
        unit: Its unit; empty for a count or a ratio.
        versus: The metric of the same run that it is compared with, if any.
        ratio: ``value`` divided by that one's value.
    """

    metric: str
    value: float
    unit: str
    versus: str | None = None
    ratio: float | None = None


def describe_machine() -> dict[str, str | int]:
    """Say what the numbers were measured on."""
    machine: dict[str, str | int] = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count() or 0,
        "memory_bytes": psutil.virtual_memory().total,
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    return machine | {package: importlib.metadata.version(package) for package in PACKAGES}


def write_report(name: str, rows: list[Row], title: str, table: Table | None = None) -> None:
    """Print the numbers as a table and keep them in ``bench/results/<name>.json``.

    Args:
        name: The benchmark's module.
        rows: The numbers.
        title: What they show, in a line.
        table: How to print them; ``None`` for a line each.
    """
    machine = describe_machine()
    report = {
        "title": title,
        "machine": machine,
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "rows": [asdict(row) for row in rows],
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    console = Console()
    console.print(table or _table(rows, title))
    console.print(", ".join(f"{key} {value}" for key, value in machine.items()), style="dim")


def _table(rows: list[Row], title: str) -> Table:
    table = Table(title=title)
    for heading in ("metric", "value", "unit", "versus", "ratio"):
        table.add_column(heading, justify="right" if heading in ("value", "ratio") else "left")
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
        table.add_row(row.metric, f"{row.value:.5g}", row.unit, row.versus or "", ratio)
    return table


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # only Linux has it
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _commit() -> str:
    """The commit's hash; ``-dirty`` if files that git knows have changed since."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40"]
    done = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"

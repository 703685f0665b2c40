"""Run all benchmarks, or those that are named: ``python -m bench [name ...]``."""

import importlib
import os
import pkgutil
import platform
import sys

import bench


def main(names: list[str]) -> None:
    """Describe the machine, then run the benchmarks.

    Args:
        names: Modules of this folder; empty for all.
    """
    known = [
        found.name
        for found in pkgutil.iter_modules(bench.__path__)
        if not found.ispkg and found.name not in ("__main__", "passages", "quality", "report")
    ]
    if unknown := set(names) - set(known):
        sys.exit(f"no benchmark {', '.join(sorted(unknown))}; there are: {', '.join(known)}")
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}"
    print(f"Corolla's benchmarks on {machine}")
    for name in names or known:
        print(f"\n## {name}")
        importlib.import_module(f"bench.{name}").main()


if __name__ == "__main__":
    main(sys.argv[1:])

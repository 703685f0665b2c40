"""How large processes are, now and as time goes by: what a leak shows in."""

import re
import urllib.request
from collections import defaultdict
from typing import NamedTuple

import psutil

from corolla.testing.processes import ServerProcess

__all__ = ["Growth", "Size", "Sizes"]


class Size(NamedTuple):
    """How large a process is.

    Args:
        memory_bytes: Its memory.
        files: Its open files.
        threads: Its threads.
        tasks: The tasks of its event loops.
    """

    memory_bytes: int
    files: int
    threads: int
    tasks: int

    @classmethod
    def of(cls, process: psutil.Process, tasks: int = 0) -> "Size":
        """Measure a process."""
        files = process.num_fds() if hasattr(process, "num_fds") else process.num_handles()
        return cls(process.memory_info().rss, files, process.num_threads(), tasks)

    @classmethod
    def of_server(cls, server: ServerProcess) -> "Size":
        """Measure a server, which must have been started with ``--metrics-port``."""
        with urllib.request.urlopen(server.stages["metrics"]["url"], timeout=30) as answer:
            found = re.search(rb"^corolla_server_tasks (\S+)", answer.read(), re.MULTILINE)
        return cls.of(psutil.Process(server.process.pid), int(float(found[1])) if found else 0)


class Growth(NamedTuple):
    """How much larger a process was in the last quarter of a time than in its second one, on average.

    The first quarter is left out: until then, caches and pools fill.

    Args:
        memory_bytes: Its memory.
        files: Its open files.
        threads: Its threads.
        tasks: The tasks of its event loops.
    """

    memory_bytes: float
    files: float
    threads: float
    tasks: float


class Sizes:
    """Sizes of several processes, by name, in the order in which they were measured."""

    def __init__(self) -> None:
        self._seen: defaultdict[str, list[Size]] = defaultdict(list)

    def note(self, name: str, size: Size) -> None:
        """Note how large one is now."""
        self._seen[name].append(size)

    def growths(self) -> dict[str, Growth]:
        """Say by how much each has grown of which there are enough sizes, four at least."""
        return {name: _growth(sizes) for name, sizes in self._seen.items() if len(sizes) >= 4}


def _growth(sizes: list[Size]) -> Growth:
    quarter = len(sizes) // 4
    early, late = sizes[quarter : 2 * quarter], sizes[-quarter:]
    grown = [
        (sum(after) - sum(before)) / quarter
        for before, after in zip(zip(*early, strict=True), zip(*late, strict=True), strict=True)
    ]
    return Growth(*grown)

"""The lab: hosts on an emulated internet, from up to down."""

import contextlib
import fcntl
import ipaddress
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from bench.wanlab.hosts import RTT_MS, SETTINGS, Host, read_topology
from bench.wanlab.namespaces import STATE, Plan, change_address, inside, is_stale, teardown
from bench.wanlab.table import COUNTERS, Link, Route, Table

__all__ = ["Lab"]

_ROOT: Final = Path(__file__).parents[2]
_NETWORK: Final = ipaddress.ip_address("11.0.0.0")  # looks public to software that checks


class Lab:
    """Hosts on an emulated internet. As a context manager: up inside, gone outside.

    Args:
        hosts: The machines.
        rtt_ms: Round trips between two hosts or regions, access links excluded, by their two names.
        name: The lab's; chosen if empty.
        mtu: Of every link.
        seed: Of loss and jitter.
        tcp: Congestion control.

    Raises:
        ValueError: If two hosts have the same name.
    """

    def __init__(
        self,
        hosts: Sequence[Host],
        rtt_ms: Mapping[str, float] | None = None,
        name: str = "",
        *,
        mtu: int = 1500,
        seed: int = 1,
        tcp: str = "cubic",
    ) -> None:
        self.hosts = list(hosts)
        self.name = name or f"lab-{os.urandom(3).hex()}"
        self.mtu, self.seed, self.tcp = mtu, seed, tcp
        self._rtt_ms = {" ".join(sorted(pair.split())): ms for pair, ms in (rtt_ms or {}).items()}
        self._number = {host.name: number for number, host in enumerate(self.hosts)}
        self._table: Table | None = None
        self._keeper: subprocess.Popen[str] | None = None
        self._hold: int | None = None
        if len(self._number) < len(self.hosts):
            raise ValueError("two hosts have the same name")

    @classmethod
    def load(cls, source: str | Path, count: int | None = None, name: str = "") -> Self:
        """Read a topology; see :func:`~bench.wanlab.hosts.read_topology`."""
        hosts, options = read_topology(source, count)
        return cls(hosts, **(options | ({"name": name} if name else {})))

    @classmethod
    def attach(cls, name: str) -> Self:
        """Find a lab that is up already."""
        lab = cls.load(STATE / name / "topology.json")
        lab._table = Table(STATE / name / "table", len(lab.hosts))
        return lab

    def __enter__(self) -> Self:
        try:
            return self.up()
        except BaseException:
            if self._keeper is not None:
                self.down()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down()

    def up(self, *, detached: bool = False) -> Self:
        """Start. Unless detached, the lab ends with this process, however that ends.

        Raises:
            RuntimeError: If it cannot be built; says why.
        """
        home = STATE / self.name
        home.mkdir(parents=True)
        with (home / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the keeper inherits it: see is_stale()
            (home / "topology.json").write_text(json.dumps(self._spec()))
            self._table = Table(home / "table", len(self.hosts))
            self._fill(self._table)
            os.mkfifo(home / "stop")
            stop = os.open(home / "stop", os.O_RDWR if detached else os.O_RDONLY | os.O_NONBLOCK)
            self._hold = os.open(home / "stop", os.O_WRONLY)  # the keeper sees it close
            self._keeper = subprocess.Popen(
                [sys.executable, "-m", "bench.wanlab", "keep", self.name],
                cwd=_ROOT,
                stdin=stop,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[lock.fileno()],
            )
            os.close(stop)
        if self._keeper.stdout is None or (report := self._keeper.stdout.readline()) != "ready\n":
            raise RuntimeError(report + (self._keeper.stdout.read() if self._keeper.stdout else ""))
        return self

    def down(self) -> None:
        """End the lab's processes and remove all of it."""
        with contextlib.suppress(OSError):
            stop = os.open(STATE / self.name / "stop", os.O_WRONLY | os.O_NONBLOCK)
            os.write(stop, b"x")
            os.close(stop)
        while not is_stale(self.name):
            time.sleep(0.02)
        if self._keeper is not None:
            self._keeper.communicate()
            self._keeper = None
        if self._hold is not None:
            os.close(self._hold)
            self._hold = None
        teardown(self.name)

    @property
    def table(self) -> Table:
        """The memory that is shared with the keeper, while the lab is up."""
        if self._table is None:
            raise RuntimeError("the lab is not up")
        return self._table

    @property
    def keeper_id(self) -> int:
        """The process that forwards the packets of a lab that this object started."""
        if self._keeper is None:
            raise RuntimeError("this object has not started the lab")
        return self._keeper.pid

    def rtt_ms(self, a: Host, b: Host) -> float:
        """Give the round trip between two access links, theirs excluded."""
        keys = [" ".join(sorted((x, y))) for x in (a.name, a.region) for y in (b.name, b.region)]
        return next((known[key] for known in (self._rtt_ms, RTT_MS) for key in keys if key in known), 0.0)

    def addr(self, host: str) -> str:
        """Give the host's present address on the internet: its own, or that of its router."""
        return self.link(host).address

    def readdress(self, host: str) -> str:
        """Give the host, or its router, another address, as a provider may at any time; give the new one."""
        old, link = self.addr(host), self.link(host)
        count = len(self.hosts)
        link.addr = link.addr + count if link.addr - int(_NETWORK) <= count else link.addr - count
        change_address(self.edge(host), old, link.address)
        return link.address

    def namespace(self, host: str) -> str:
        """Give the host's network namespace."""
        return f"wl.{self.name}.{self.hosts[self._number[host]].name}"

    def edge(self, host: str) -> str:
        """Give the namespace that has the host's address on the internet: its own, or its router's."""
        return self.namespace(host) + (".nat" if self.hosts[self._number[host]].nat else "")

    def link(self, host: str) -> Link:
        """Give the host's access link, to read and to change."""
        return self.table.links[self._number[host]]

    def path(self, a: str, b: str) -> Route:
        """Give what lies between the access links, from a to b, to read and to change."""
        return self.table.routes[self._number[a]][self._number[b]]

    def partition(self, *groups: Iterable[str]) -> None:
        """Cut all paths between hosts of different groups."""
        side = {host: number for number, group in enumerate(groups) for host in group}
        for a in side:
            for b in side:
                self.path(a, b).cut |= side[a] != side[b]

    def heal(self) -> None:
        """Undo all partitions."""
        for route in (route for row in self.table.routes for route in row):
            route.cut = 0

    def command(self, host: str, command: Sequence[str]) -> list[str]:
        """Give the command line that runs a command in the host."""
        return ["ip", "netns", "exec", self.namespace(host), *map(str, command)]

    def popen(self, host: str, command: Sequence[str], **options: Any) -> "subprocess.Popen[Any]":
        """Start a process in the host; ``options`` as those of :class:`subprocess.Popen`."""
        return subprocess.Popen(self.command(host, command), **options)

    def run(self, host: str, command: Sequence[str], **options: Any) -> "subprocess.CompletedProcess[Any]":
        """Run a process in the host to its end; ``options`` as those of :func:`subprocess.run`."""
        return subprocess.run(self.command(host, command), **{"check": False} | options)

    def socket(self, host: str, kind: int = socket.SOCK_DGRAM) -> socket.socket:
        """Make a socket of this process that lives in the host."""
        with inside(self.namespace(host)):
            return socket.socket(socket.AF_INET, kind)

    def plan(self) -> Plan:
        """Give what every namespace must know."""
        names = "".join(f"{self.addr(name)} {name}\n" for name in self._number)
        return Plan(self.name, names, mtu=self.mtu, tcp=self.tcp)

    def status(self) -> str:
        """Write a table of the links with their settings and counters."""
        numbers = (*SETTINGS, "up", *COUNTERS)
        rows: list[Sequence[str]] = [("host", "address", "region", "nat", *numbers)]
        for host in self.hosts:
            link = self.link(host.name)
            values = (f"{getattr(link, name):.10g}" for name in numbers)
            rows.append((host.name, link.address, host.region or "-", host.nat or "-", *values))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        head = self.table.head
        return "\n".join(
            [
                f"{self.name}: {head.delivered} packets delivered, {head.late} of them over 1 ms late, "
                f"the worst {head.worst_late_us / 1e3:.1f} ms; {head.unroutable} unroutable",
                *("  ".join(map(str.rjust, row, widths)) for row in rows),
            ]
        )

    def _spec(self) -> dict[str, object]:
        hosts = {host.name: asdict(host) for host in self.hosts}
        options = {"rtt_ms": self._rtt_ms, "name": self.name, "mtu": self.mtu, "seed": self.seed, "tcp": self.tcp}
        return {**options, "hosts": hosts}

    def _fill(self, table: Table) -> None:
        for a, host in enumerate(self.hosts):
            link = table.links[a]
            link.set(up=True, **{name: getattr(host, name) for name in SETTINGS})
            link.addr = int(_NETWORK) + a + 1
            for b, other in enumerate(self.hosts):
                table.routes[a][b].delay_ms = self.rtt_ms(host, other) / 2

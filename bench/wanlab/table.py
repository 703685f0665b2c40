"""The memory that a lab shares with its keeper: settings that hold from the next packet on, and counters.

``wancore.c`` mirrors these records field by field.
"""

import ctypes
import ipaddress
import mmap
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

from bench.wanlab.hosts import SETTINGS

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["COUNTERS", "Head", "Link", "Route", "Table"]

COUNTERS: Final = ("tx_packets", "tx_bytes", "rx_packets", "rx_bytes", "lost", "overflowed", "cut")
"""What an access link counts."""


class Head(ctypes.Structure):
    """How well time is kept: ``late`` packets were delivered over 1 ms after they were due."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("delivered", "late", "worst_late_us", "unroutable")]

    delivered: int
    late: int
    worst_late_us: int
    unroutable: int


class Link(ctypes.Structure):
    """An access link: live settings and counters."""

    _fields_ = [
        *((name, ctypes.c_double) for name in SETTINGS),
        *((name, ctypes.c_uint64) for name in ("up", "addr", *COUNTERS)),
    ]

    up_mbit: float
    down_mbit: float
    delay_ms: float
    jitter_ms: float
    loss: float
    queue_ms: float
    up: int
    addr: int
    tx_packets: int
    tx_bytes: int
    rx_packets: int
    rx_bytes: int
    lost: int
    overflowed: int
    cut: int

    def set(self, **settings: float) -> None:
        """Change settings: those of a host, and ``up`` (if 0, everything is dropped).

        Raises:
            AttributeError: If there is no such setting.
        """
        if unknown := settings.keys() - {*SETTINGS, "up"}:
            raise AttributeError(f"a link has no {', '.join(unknown)}, but {', '.join(SETTINGS)} and up")
        for name, value in settings.items():
            setattr(self, name, int(value) if name == "up" else value)

    @property
    def address(self) -> str:
        """The address on the internet that packets reach this link by."""
        return str(ipaddress.ip_address(self.addr))


class Route(ctypes.Structure):
    """What lies between two access links, in one direction; ``cut`` if partitioned."""

    _fields_ = [("delay_ms", ctypes.c_double), ("loss", ctypes.c_double), ("cut", ctypes.c_uint64)]

    delay_ms: float
    loss: float
    cut: int


class Table:
    """A file of these records, mapped into memory.

    Args:
        path: Where; made if it is not there.
        hosts: How many.

    Attributes:
        head: How well time is kept.
        links: One a host.
        routes: One from each host to each.
    """

    def __init__(self, path: Path, hosts: int) -> None:
        link_bytes, route_bytes = ctypes.sizeof(Link) * hosts, ctypes.sizeof(Route) * hosts * hosts
        size = ctypes.sizeof(Head) + link_bytes + route_bytes
        with path.open("a+b") as file:
            file.truncate(size)
            memory = mmap.mmap(file.fileno(), size)
        self.head = Head.from_buffer(memory)
        self.links = cast("Sequence[Link]", (Link * hosts).from_buffer(memory, ctypes.sizeof(Head)))
        flat = (Route * (hosts * hosts)).from_buffer(memory, ctypes.sizeof(Head) + link_bytes)
        self.flat_routes = flat
        self.routes = [[flat[a * hosts + b] for b in range(hosts)] for a in range(hosts)]

"""A wide-area network on one Linux machine: hosts, home routers, delay, loss and rate. README.md says how to use it.

Owns network namespaces of its own and touches nothing outside them. Knows nothing of Corolla.
"""

from bench.wanlab.hosts import Host, NatKind
from bench.wanlab.lab import Lab
from bench.wanlab.namespaces import find_obstacle
from bench.wanlab.table import Link, Route

__all__ = ["Host", "Lab", "Link", "NatKind", "Route", "find_obstacle"]

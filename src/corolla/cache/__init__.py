"""The KV pool: pages, leases, and the rows whose tensors fill them.

Holds no clock, thread or socket: when a lease expires is for its owner to say.
"""

from corolla.cache.pool import PAGE_TOKENS, Lease, PagePool, pages_for
from corolla.cache.rows import RowKV

__all__ = ["PAGE_TOKENS", "Lease", "PagePool", "RowKV", "pages_for"]

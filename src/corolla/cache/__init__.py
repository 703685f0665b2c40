"""The KV pool: pages, leases, the rows whose tensors fill them, and what rows may share.

Holds no clock, thread or socket: when a lease expires is for its owner to say.
"""

from corolla.cache.content import Content
from corolla.cache.pool import PAGE_TOKENS, Lease, PagePool, pages_for
from corolla.cache.prefixes import Beginning, Prefixes
from corolla.cache.rows import RowKV

__all__ = ["PAGE_TOKENS", "Beginning", "Content", "Lease", "PagePool", "Prefixes", "RowKV", "pages_for"]

"""Pure decisions about a snapshot: which chain a client should use, and which span a server should take."""

from corolla.routing.bans import Bans
from corolla.routing.chain import Demand, RoutingConfig, block_seconds, find_chain, uncovered
from corolla.routing.placement import choose_span, claims_before, coverage

__all__ = [
    "Bans",
    "Demand",
    "RoutingConfig",
    "block_seconds",
    "choose_span",
    "claims_before",
    "coverage",
    "find_chain",
    "uncovered",
]

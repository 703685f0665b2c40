"""Pure decisions about a snapshot: which chain a client should use, and which span a server should take."""

from corolla.routing.bans import Bans
from corolla.routing.chain import Demand, RoutingConfig, block_seconds, find_chain, uncovered
from corolla.routing.layout import Layout, Sizes, read_layout
from corolla.routing.placement import Move, PlacementConfig, choose_span, claims_before, confirm_move, plan_moves

__all__ = [
    "Bans",
    "Demand",
    "Layout",
    "Move",
    "PlacementConfig",
    "RoutingConfig",
    "Sizes",
    "block_seconds",
    "choose_span",
    "claims_before",
    "confirm_move",
    "find_chain",
    "plan_moves",
    "read_layout",
    "uncovered",
]

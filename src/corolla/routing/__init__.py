"""Pure decisions about a snapshot: which chain a client should use, and which span a server should take."""

from corolla.routing.bans import Bans
from corolla.routing.candidates import candidates, likely_successors
from corolla.routing.chain import find_chain, predict_s, uncovered
from corolla.routing.costs import Demand, Known, Measured, RoutingConfig, Trust
from corolla.routing.experience import Experience, Work
from corolla.routing.layout import Layout, Sizes, read_layout
from corolla.routing.placement import (
    Move,
    PlacementConfig,
    choose_span,
    claims_before,
    confirm_move,
    find_moves,
    find_span,
    plan_moves,
)
from corolla.routing.throughput import Lane, find_chains, split

__all__ = [
    "Bans",
    "Demand",
    "Experience",
    "Known",
    "Lane",
    "Layout",
    "Measured",
    "Move",
    "PlacementConfig",
    "RoutingConfig",
    "Sizes",
    "Trust",
    "Work",
    "candidates",
    "choose_span",
    "claims_before",
    "confirm_move",
    "find_chain",
    "find_chains",
    "find_moves",
    "find_span",
    "likely_successors",
    "plan_moves",
    "predict_s",
    "read_layout",
    "split",
    "uncovered",
]

"""Where the command line remembers things between two runs."""

from dataclasses import replace
from pathlib import Path

from platformdirs import user_state_path

from corolla.swarm import SwarmConfig

__all__ = ["state_directory", "with_state"]


def state_directory() -> Path:
    """Give the place where this account remembers things."""
    return user_state_path("corolla", appauthor=False)


def with_state(config: SwarmConfig) -> SwarmConfig:
    """Give settings of the swarm with a place to remember things: the one that they name, or that of this account.

    Args:
        config: The settings.
    """
    return config if config.state else replace(config, state=state_directory())

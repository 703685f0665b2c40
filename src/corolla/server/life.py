"""How far a server has come, and what its steps from one stage to the next share. Knows nothing of what they are."""

from collections.abc import Awaitable, Callable
from typing import Literal, NamedTuple

from anyio.abc import TaskGroup

from corolla.hub import Progress

__all__ = ["Life", "Stage"]

Stage = Literal["listening", "joined", "claimed", "loaded", "online", "moving", "reached", "draining", "left"]
"""How far a server has come; each stage is told to whoever watches. From ``moving`` it comes to ``online`` again;
whenever others reach it at other addresses than before, it is ``reached``."""


class Life(NamedTuple):
    """What a running server's steps share: whose tasks they start, and who hears of them."""

    tasks: TaskGroup
    reach: Callable[[Stage], Awaitable[None]]
    report: Progress

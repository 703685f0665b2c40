"""What a swarm is doing, for those who run it: a picture of it, what changed, and how it was before. No torch.

Looks at a swarm as any client does, and takes no part in it. The web page and the terminal show the same picture.
"""

from corolla.monitor.changes import Change, Happening, compare
from corolla.monitor.config import MonitorConfig
from corolla.monitor.look import Look, look_at_swarm, watching
from corolla.monitor.observer import Observer, observing
from corolla.monitor.picture import ModelView, NextServer, Picture, ServerView, draw

__all__ = [
    "Change",
    "Happening",
    "Look",
    "ModelView",
    "MonitorConfig",
    "NextServer",
    "Observer",
    "Picture",
    "ServerView",
    "compare",
    "draw",
    "look_at_swarm",
    "observing",
    "watching",
]

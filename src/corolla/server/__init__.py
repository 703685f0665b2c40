"""Serving a span: the life of a server, and what it answers.

Wires the hub, blocks, engine and swarm together; knows nothing of clients but what they send.
"""

from corolla.server.config import ServerConfig
from corolla.server.server import Server, Stage

__all__ = ["Server", "ServerConfig", "Stage"]

"""Serving a span: the life of a server, and what it answers.

Wires the hub, blocks, engine and swarm together; knows nothing of clients but what they send.
"""

from corolla.server.config import ServerConfig
from corolla.server.life import Stage
from corolla.server.server import Server

__all__ = ["Server", "ServerConfig", "Stage"]

"""An OpenAI-compatible HTTP API over a swarm: chats, completions, embeddings, API keys.

It is a client of the swarm like any other. Gateways that share a database know the same keys; nothing else that matters
is kept in one, so any number may stand behind a load balancer. Only the settings are here, because they must be known
where FastAPI is not installed; ``gateway/app.py`` is the way in.
"""

from corolla.gateway.config import GatewayConfig, KeyConfig

__all__ = ["GatewayConfig", "KeyConfig"]

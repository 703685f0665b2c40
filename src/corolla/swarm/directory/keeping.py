"""What keeps a peer's directory: gossip, or the store that its settings name."""

import random

from corolla.swarm.directory.directory import Directory
from corolla.swarm.directory.gossip import Gossip
from corolla.swarm.directory.presence import Presence
from corolla.swarm.directory.redis_store import RedisStore
from corolla.swarm.directory.store import StoredPresence, StoreWatcher
from corolla.swarm.directory.watcher import Watcher
from corolla.swarm.endpoint import Endpoint
from corolla.swarm.finding.contacts import Contacts

__all__ = ["make_presence", "make_watcher"]


def make_presence(endpoint: Endpoint, directory: Directory, contacts: Contacts, *, rng: random.Random) -> Presence:
    """Make a server's part in the directory.

    Args:
        endpoint: How to reach peers, and who this one is.
        directory: What is kept in step.
        contacts: Whom to turn to, if servers gossip.
        rng: The dice.

    Raises:
        ConfigError: If the store that the settings name cannot be used.
    """
    if (store := _store(endpoint)) is not None:
        return StoredPresence(endpoint, directory, store, rng=rng)
    return Gossip(endpoint, directory, contacts, rng=rng)


def make_watcher(endpoint: Endpoint, directory: Directory, contacts: Contacts, *, rng: random.Random) -> Watcher:
    """Make a client's view of the directory; takes and raises what :func:`make_presence` does."""
    if (store := _store(endpoint)) is not None:
        return StoreWatcher(endpoint, directory, store, rng=rng)
    return Watcher(endpoint, directory, contacts, rng=rng)


def _store(endpoint: Endpoint) -> RedisStore | None:
    config, membership = endpoint.config, endpoint.membership
    if config.directory is None:
        return None
    return RedisStore(config.directory, "public" if membership is None else membership.swarm, config)

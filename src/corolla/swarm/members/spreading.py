"""How news of revoked invites gets through a private swarm. Knows nothing of what is in them.

Every new stream tells both sides who has the newer list (``members/admission.py``). So to spread it is to open streams:
one to a random peer now and then, and some at once when a newer list was heard.
"""

import logging
import random
from collections.abc import Callable
from typing import TYPE_CHECKING

import anyio
from anyio import to_thread

from corolla.errors import Error
from corolla.terms import Announcement, Snapshot

if TYPE_CHECKING:
    from corolla.swarm.endpoint import Endpoint

__all__ = ["spread_revocations"]

_LOG = logging.getLogger(__name__)


async def spread_revocations(endpoint: "Endpoint", snapshot: Callable[[], Snapshot], *, rng: random.Random) -> None:
    """Keep this peer's list of revoked invites as new as the swarm's, until cancelled; in a public swarm, do nothing.

    What is heard is written down, if there is a place for it.

    Args:
        endpoint: How to reach peers.
        snapshot: Gives the servers of the swarm.
        rng: The dice that choose among them.

    Raises:
        NotAMember: When this peer's own invite has expired or was revoked.
    """
    membership, config = endpoint.membership, endpoint.config
    if membership is None:
        return
    told = -1  # so that what was heard on the way in is written down and passed on
    while True:
        if membership.number == told:
            with anyio.move_on_after(config.greet_s * rng.uniform(0.8, 1.2)):
                await membership.changed.wait()
        has_news, told = membership.number > told, membership.number
        if has_news:
            await to_thread.run_sync(membership.save)
        membership.check_own()
        peers = [server for server in snapshot().announcements if server.peer != endpoint.peer_id]
        chosen = rng.sample(peers, min(config.fanout if has_news else 1, len(peers)))
        async with anyio.create_task_group() as tasks:
            for server in chosen:
                tasks.start_soon(_greet, endpoint, server)


async def _greet(endpoint: "Endpoint", server: Announcement) -> None:
    try:
        await endpoint.greet(server.peer, server.addresses)
    except Error as error:
        _LOG.debug("could not greet: %s", error.message)

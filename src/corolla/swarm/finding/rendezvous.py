"""What peers that do not know each other yet agree on, to find one another: a swarm and a model, as opaque tags.

A private swarm's id is nobody else's business, so what is said in public is a hash of it.
"""

import hashlib
from typing import Final, NamedTuple

from corolla.swarm.members.invite import SwarmId
from corolla.terms import ModelId

__all__ = ["PUBLIC", "Topic"]

PUBLIC: Final = ""
"""The tag of all public swarms."""

_TAG_DIGITS: Final = 16


class Topic(NamedTuple):
    """Whom a peer wants to meet.

    Args:
        swarm: Members of this private swarm, whatever they serve; ``None`` for public peers.
        model: Among public peers, servers of this model; ``None`` for those of any.
    """

    swarm: SwarmId | None
    model: ModelId | None

    @property
    def swarm_tag(self) -> str:
        """Sixteen digits that stand for the private swarm; nothing for a public one."""
        return PUBLIC if self.swarm is None else _digest("swarm", self.swarm).hex()[:_TAG_DIGITS]

    @property
    def model_tag(self) -> str | None:
        """The first sixteen digits of the model's id."""
        return None if self.model is None else self.model[:_TAG_DIGITS]

    @property
    def key(self) -> bytes:
        """Twenty bytes that stand for the private swarm, or for the model in public ones, as the key of a lookup."""
        return _digest("model", self.model or "")[:20] if self.swarm is None else _digest("members", self.swarm)[:20]


def _digest(*parts: str) -> bytes:
    return hashlib.sha256("\0".join(("corolla rendezvous 1", *parts)).encode()).digest()

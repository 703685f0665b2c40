"""How often a peer says something, by the size of the swarm, so that what everybody hears stays bounded. Pure.

Whatever one server says, all hear. Up to fifty servers each repeats its announcement every ``refresh_s``; in larger
swarms less often, so that ten a second are heard in all, and from a thousand servers on as many more as there are
servers. Death is not noticed by silence then, but by the neighbours (``directory/exchange.py``).
"""

from typing import Final

import msgspec

from corolla.swarm.config import SwarmConfig
from corolla.terms import Announcement, Claim

__all__ = ["Allowance", "matters", "reconcile_s", "refresh_s", "steadied", "ttl_s"]

_UNHURRIED_SERVERS: Final = 50
_MOST_DELAY: Final = 20.0
_RECONCILED_PER_S: Final = 100.0
_LONGEST_RECONCILE_S: Final = 30.0
_NOTABLE: Final = 0.25
_LEAST: Final = {"queue_s": 0.1, "progress": 0.1, "rtts": 0.02}  # changes below do not matter
_UNHURRIED: Final = frozenset({"sequence", "ttl_s", "rtts"})
_MEASURED: Final = ("speed", "rtts", "bytes_per_s")


def refresh_s(config: SwarmConfig, servers: int) -> float:
    """Say how long an announcement may stay as it is before it is repeated, in a swarm of so many servers."""
    return config.refresh_s * min(max(1.0, servers / _UNHURRIED_SERVERS), _MOST_DELAY)


def ttl_s(config: SwarmConfig, servers: int) -> float:
    """Say for how long an announcement should hold."""
    return config.ttl_s * refresh_s(config, servers) / config.refresh_s


def reconcile_s(config: SwarmConfig, servers: int) -> float:
    """Say how often directories should be compared with a neighbour's."""
    return max(config.gossip_interval_s, min(servers / _RECONCILED_PER_S, _LONGEST_RECONCILE_S))


def matters(old: Claim, new: Claim) -> bool:
    """Say whether others should hear of a change now: a number by a quarter, or from or to zero, or anything else."""
    before, after = (msgspec.to_builtins(one, builtin_types=(bytes,)) for one in (old, new))
    return any(_differs(before.get(name), after[name], _LEAST.get(name, 0.0)) for name in after.keys() - _UNHURRIED)


def steadied(old: Claim, new: Claim) -> Claim:
    """Leave measurements as they were said, if they have hardly changed: they make announcements long."""
    if not isinstance(old, Announcement) or not isinstance(new, Announcement):
        return new
    before, after = ({name: msgspec.to_builtins(getattr(one, name)) for name in _MEASURED} for one in (old, new))
    names = [name for name in _MEASURED if not _differs(before[name], after[name], _LEAST.get(name, 0.0))]
    return msgspec.structs.replace(new, **{name: getattr(old, name) for name in names})


def _differs(old: object, new: object, least: float) -> bool:
    if isinstance(old, int | float) and isinstance(new, int | float):
        return abs(new - old) > max(_NOTABLE * abs(old), least)
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
        return any(_differs(old[name], new[name], least) for name in old)
    if isinstance(old, list | tuple) and isinstance(new, list | tuple) and len(old) == len(new):
        return any(_differs(one, other, least) for one, other in zip(old, new, strict=True))
    return bool(old != new)


class Allowance:
    """How much of something may be done: so much at once, and so much a second on average.

    Args:
        most: At once.
        per_s: A second.
    """

    def __init__(self, most: float, per_s: float) -> None:
        self._most = most
        self._left = most
        self._per_s = per_s
        self._at_s: float | None = None

    def take(self, amount: float, now_s: float, *, per_s: float | None = None) -> bool:
        """Use some of it, if there is enough.

        Args:
            amount: How much.
            now_s: The local monotonic time.
            per_s: The rate from now on; ``None`` for the same as before.

        Returns:
            Whether there was enough.
        """
        passed_s = 0.0 if self._at_s is None else now_s - self._at_s
        self._left = min(self._most, self._left + passed_s * self._per_s)
        self._at_s = now_s
        self._per_s = self._per_s if per_s is None else per_s
        if amount > self._left:
            return False
        self._left -= amount
        return True

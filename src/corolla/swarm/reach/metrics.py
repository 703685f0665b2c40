"""What a relay tells Prometheus. Needs the prometheus_client package, so the rest of this room does not import it."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, ProcessCollector

from corolla.swarm.reach.relay import RelayLoad
from corolla.telemetry.metrics import Reading, Readings

__all__ = ["relay_readings", "relay_registry"]

_Load = Callable[[], RelayLoad | None]


def relay_readings(load: _Load) -> list[Reading]:
    """Give the numbers of a relay.

    Args:
        load: Gives what it does for others; ``None`` while it is no relay.
    """

    def say(read: Callable[[RelayLoad], float]) -> Callable[[], float | None]:
        return lambda: None if (now := load()) is None else read(now)

    return [
        Reading("corolla_relay_peers", "Reached by it.", say(lambda one: one.peers)),
        Reading("corolla_relay_streams", "Joined by it.", say(lambda one: one.streams)),
        Reading("corolla_relay_passed_bytes_total", "Passed on.", say(lambda one: one.passed_bytes)),
        Reading("corolla_relay_refused_total", "Refused.", say(lambda one: one.refused)),
    ]


def relay_registry(load: _Load) -> CollectorRegistry:
    """Give all that a peer tells that is a relay and nothing else.

    Args:
        load: Gives what it does for others.
    """
    registry = CollectorRegistry()
    Readings(registry, relay_readings(load))
    ProcessCollector(registry=registry)
    return registry

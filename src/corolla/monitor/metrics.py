"""What the monitor tells Prometheus of a swarm: few numbers a model, however many servers there are."""

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry

from corolla.monitor.observer import Observer
from corolla.monitor.picture import ModelView
from corolla.telemetry.metrics import Reading, Readings

__all__ = ["observe_swarm"]

_LABEL = "gen_ai_request_model"


def observe_swarm(observer: Observer, registry: CollectorRegistry) -> None:
    """Have a registry tell of the swarm.

    Args:
        observer: What sees it.
        registry: Where the metrics belong.
    """

    def models(read: Callable[[ModelView], float]) -> Callable[[], Mapping[str, float]]:
        return lambda: {f"{one.name}@{one.model[:12]}": read(one) for one in observer.picture.models}

    def unanswered(model: ModelView) -> int:
        return sum(server.answers is False for server in model.servers)

    Readings(
        registry,
        [
            Reading("corolla_swarm_servers", "Servers of a model.", models(lambda one: one.servers_total), _LABEL),
            Reading("corolla_swarm_online", "Servers that take sessions.", models(lambda one: one.online), _LABEL),
            Reading("corolla_swarm_unanswered", "Servers that do not answer.", models(unanswered), _LABEL),
            Reading("corolla_swarm_blocks", "Blocks of a model.", models(lambda one: one.blocks), _LABEL),
            Reading("corolla_swarm_missing_blocks", "Of no server online.", models(lambda one: one.missing), _LABEL),
            Reading(
                "corolla_swarm_tokens_per_second",
                "Of the weakest block: what all sessions together can have.",
                models(lambda one: one.tokens_per_s),
                _LABEL,
            ),
            Reading(
                "corolla_swarm_session_tokens_per_second",
                "Of one session, as predicted from here.",
                models(lambda one: one.session_tokens_per_s or 0.0),
                _LABEL,
            ),
            Reading(
                "corolla_swarm_free_kv_tokens", "Room in every block.", models(lambda one: one.free_tokens), _LABEL
            ),
            Reading("corolla_swarm_sessions", "Most through one block.", models(lambda one: one.sessions), _LABEL),
            Reading("corolla_swarm_relays", "Peers that help others.", lambda: observer.picture.relays),
            Reading("corolla_swarm_view_age_seconds", "How old the view is.", lambda: observer.picture.age_s),
            Reading("corolla_swarm_changes_total", "What happened.", lambda: dict(observer.counts), "what"),
        ],
    )

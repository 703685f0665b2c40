"""The settings of the swarm room: defaults, units and help in one frozen type. Reads no file and no environment."""

from dataclasses import dataclass, field, fields

from corolla.errors import ConfigError

__all__ = ["SwarmConfig"]


def _setting(default: float, unit: str, text: str) -> float:
    setting: float = field(default=default, metadata={"help": text, "unit": unit})
    return setting


def _limit(default: int, unit: str, text: str) -> int:
    limit: int = field(default=default, metadata={"help": text, "unit": unit})
    return limit


@dataclass(frozen=True, slots=True, kw_only=True)
class SwarmConfig:
    """How this peer listens, dials and gossips; each field's help and unit are in its metadata.

    Raises:
        ConfigError: If a number is not positive, or two of them contradict each other.
    """

    handshake_s: float = _setting(10.0, "s", "Give up on a peer that has not finished the handshake by then.")
    stall_s: float = _setting(
        20.0, "s", "Take a host for vanished if sent bytes stay unconfirmed for this long (Linux)."
    )
    max_handshakes: int = _limit(64, "handshakes", "Handshakes that one listener carries on at once.")
    max_connections: int = _limit(2048, "connections", "Connections that one listener holds; more are closed at once.")
    max_streams: int = _limit(2048, "streams", "Accepted streams that are served at once; more are answered busy.")
    max_streams_per_peer: int = _limit(256, "streams", "The same for one peer.")
    race_delay_s: float = _setting(0.25, "s", "Try a peer's next address if the last has not answered by then.")
    idle_s: float = _setting(30.0, "s", "Close a pooled channel that nobody used for this long.")
    max_idle_per_peer: int = _limit(8, "channels", "Idle channels that are kept for one peer.")
    request_s: float = _setting(5.0, "s", "Deadline of one exchange of announcements or one ping.")
    gossip_interval_s: float = _setting(1.0, "s", "Reconcile with a random peer this often, give or take a fifth.")
    ttl_s: float = _setting(20.0, "s", "For how long this peer's announcement holds unless it is refreshed.")
    refresh_s: float = _setting(5.0, "s", "Refresh this peer's announcement this often.")
    heartbeat_s: float = _setting(1.0, "s", "Send subscribers a sign of life this often.")
    lost_after_s: float = _setting(4.0, "s", "A subscriber leaves a peer that was silent for this long.")
    fanout: int = _limit(3, "peers", "Peers that a change is passed on to.")
    greet_s: float = _setting(
        5.0, "s", "In a private swarm, compare lists of revoked invites with a random peer this often, give or take."
    )
    max_push_all: int = _limit(16, "peers", "Swarms up to this size are told of one's own changes all at once.")
    max_peers: int = _limit(16384, "peers", "Peers whose announcements are held; more are dropped.")
    keep_s: float = _setting(
        600.0, "s", "Remember an expired announcement for this long, so that no replay revives it."
    )
    invite: str | None = field(
        default=None,
        metadata={
            "help": "Invite to a private swarm, or the file that holds it; default: the swarm is public.",
            "secret": True,
        },
    )
    lan: bool = field(
        default=True, metadata={"help": "Find and be found by peers on the local network, where no address is given."}
    )
    lan_s: float = _setting(1.5, "s", "Look for peers on the local network for this long.")
    lan_interface: str | None = field(
        default=None, metadata={"help": "Address of the one interface to use for that; default: all but loopback."}
    )
    max_remembered: int = _limit(64, "peers", "Peers written down for the next start.")

    def __post_init__(self) -> None:
        for setting in fields(self):
            value = getattr(self, setting.name)
            if "unit" in setting.metadata and not value > 0:
                raise ConfigError(f"{setting.name} is {value}; it must be above 0 {setting.metadata['unit']}")
        if self.refresh_s >= self.ttl_s:
            raise ConfigError(
                f"refresh_s is {self.refresh_s}, which is not below ttl_s, {self.ttl_s}: nothing would stay"
            )
        if self.heartbeat_s >= self.lost_after_s:
            raise ConfigError(
                f"heartbeat_s is {self.heartbeat_s}, which is not below lost_after_s, {self.lost_after_s}"
            )
        if self.max_peers > 16384:
            raise ConfigError(f"max_peers is {self.max_peers}; one digest holds 16384 at most")

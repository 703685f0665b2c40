"""The settings of the swarm room: defaults, units and help in one frozen type. Reads no file and no environment."""

from dataclasses import dataclass, field, fields
from pathlib import Path

from corolla.errors import ConfigError

__all__ = ["LightConfig", "RelayConfig", "SwarmConfig"]


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
    max_bytes_per_peer: int = _limit(
        256 << 20, "bytes", "Of messages that one peer has begun to send and not finished; more ends the stream."
    )
    race_delay_s: float = _setting(0.25, "s", "Try a peer's next address if the last has not answered by then.")
    idle_s: float = _setting(30.0, "s", "Close a pooled channel that nobody used for this long.")
    max_idle_per_peer: int = _limit(8, "channels", "Idle channels that are kept for one peer.")
    request_s: float = _setting(5.0, "s", "Deadline of one exchange of announcements or one ping.")
    gossip_interval_s: float = _setting(
        1.0, "s", "Compare directories with a neighbour this often; less often in swarms of more than 50 servers."
    )
    ttl_s: float = _setting(
        20.0, "s", "For how long this peer's announcement holds unless it is refreshed; longer in large swarms."
    )
    refresh_s: float = _setting(
        5.0, "s", "Refresh this peer's announcement this often; less often in swarms of more than 50 servers."
    )
    heartbeat_s: float = _setting(1.0, "s", "Send neighbours and subscribers a sign of life this often.")
    lost_after_s: float = _setting(4.0, "s", "Take a neighbour for lost, if it was silent for this long.")
    suspect_s: float = _setting(6.0, "s", "See a server no more, if it has not refuted a suspicion by then.")
    fanout: int = _limit(3, "peers", "Neighbours that a server links to; as many more link to it.")
    max_links: int = _limit(64, "links", "Links to neighbours that are held at once; further peers are answered busy.")
    rotate_s: float = _setting(60.0, "s", "Exchange a neighbour for another this often, so that news finds new ways.")
    heal_s: float = _setting(
        5.0, "s", "Look for a lost peer this often, so that parts that were cut off unite; less often in large swarms."
    )
    greet_s: float = _setting(
        5.0, "s", "In a private swarm, compare lists of revoked invites with a random peer this often, give or take."
    )
    max_peers: int = _limit(16384, "peers", "Peers whose announcements are held; more are dropped.")
    keep_s: float = _setting(
        1800.0, "s", "Remember an expired announcement for this long, so that no replay revives it."
    )
    clock_s: float = _setting(
        900.0, "s", "Drop announcements that are dated further ahead of this machine's clock, or back."
    )
    invite: str | None = field(
        default=None,
        metadata={
            "help": "Invite to a private swarm, or the file that holds it; default: the swarm is public.",
            "secret": True,
        },
    )
    state: Path | None = field(
        default=None,
        metadata={
            "help": "Directory for what is remembered between two runs: revoked invites; default: in Python none, "
            "on the command line that of this account."
        },
    )
    directory: str | None = field(
        default=None,
        metadata={
            "help": "Store in which the swarm's directory is kept, redis://host:port; default: servers gossip.",
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
    relays: int = _limit(2, "relays", "Relays through which this peer can be reached, if it cannot be dialled.")
    reach_check_s: float = _setting(60.0, "s", "Find out again this often whether this peer can be dialled.")
    dht: bool = field(
        default=False, metadata={"help": "Find and be found by peers anywhere, through the BitTorrent Mainline DHT."}
    )
    dht_s: float = _setting(15.0, "s", "Look for peers in the DHT for this long.")
    dht_bootstrap: tuple[str, ...] = field(
        default=(),
        metadata={"help": "Peers of a DHT of one's own, host:port, to use instead of the public one; default: that."},
    )
    dht_listen: str | None = field(
        default=None, metadata={"help": "Where to take part in the DHT, address:port; default: any, on all interfaces."}
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
        if self.keep_s < 2 * self.clock_s:
            raise ConfigError(
                f"keep_s is {self.keep_s}, which is below twice clock_s, {self.clock_s}: replays would pass for new"
            )
        if self.max_peers > 16384:
            raise ConfigError(f"max_peers is {self.max_peers}; one list holds 16384 at most")


@dataclass(frozen=True, slots=True, kw_only=True)
class LightConfig:
    """Where a peer that serves no blocks listens, and which swarm it belongs to."""

    host: str = field(default="0.0.0.0", metadata={"help": "network interface to listen on"})
    port: int = field(default=31330, metadata={"help": "port to listen on; 0 for any that is free"})
    announce: tuple[str, ...] = field(
        default=(), metadata={"help": "addresses to tell others instead of those that were found"}
    )
    peers: tuple[str, ...] = field(
        default=(), metadata={"help": "addresses of peers of the swarm to join; none starts a new swarm"}
    )
    identity: Path | None = field(
        default=None, metadata={"help": "file with the peer's key, made if it is not there; default: a new key"}
    )
    name: str = field(default="", metadata={"help": "how others see this peer; for people only"})


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayConfig:
    """How much this peer does for others who cannot be dialled. What it passes on it cannot read.

    Raises:
        ConfigError: If a number is not positive.
    """

    enabled: bool = field(default=False, metadata={"help": "be a relay for peers that cannot be dialled"})
    max_peers: int = field(default=128, metadata={"help": "peers that can be reached through it", "unit": "peers"})
    max_streams: int = field(default=512, metadata={"help": "streams that it joins at once", "unit": "streams"})
    max_streams_per_peer: int = field(
        default=64, metadata={"help": "the same for one peer or one address, on either side", "unit": "streams"}
    )
    second_bytes: int | None = field(
        default=None, metadata={"help": "passed on at most in a second; default: no limit", "unit": "bytes"}
    )
    day_bytes: int | None = field(
        default=None, metadata={"help": "passed on at most in 24 hours; default: no limit", "unit": "bytes"}
    )
    accept_s: float = field(
        default=10.0, metadata={"help": "how long a peer may take to answer who wants to reach it", "unit": "seconds"}
    )
    idle_s: float = field(
        default=900.0, metadata={"help": "a joined stream that says nothing for so long is ended", "unit": "seconds"}
    )

    def __post_init__(self) -> None:
        for setting in fields(self):
            value = getattr(self, setting.name)
            if value is not None and not isinstance(value, bool) and not value > 0:
                raise ConfigError(f"{setting.name} is {value}; it must be above 0 {setting.metadata['unit']}")

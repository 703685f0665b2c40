"""A server's settings."""

from dataclasses import dataclass, field
from pathlib import Path

from corolla.errors import ConfigError
from corolla.server.limits import PeerLimits, Sharing
from corolla.terms import Precision, Span

__all__ = ["ServerConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """What a server serves. A value of ``None`` is chosen from the swarm and the machine, and logged.

    Raises:
        ConfigError: If two values contradict each other.
    """

    model: str = field(metadata={"help": "a Hugging Face model, a directory, or smollm2"})
    blocks: Span | None = field(
        default=None, metadata={"help": "serve exactly these blocks, start:stop; default: where the swarm is weakest"}
    )
    num_blocks: int | None = field(
        default=None,
        metadata={"help": "serve so many blocks; default: as many as fit into free memory", "unit": "blocks"},
    )
    precision: Precision | None = field(
        default=None,
        metadata={"help": "what to hold weights in; default: the model's own, or nf4 if that does not fit into memory"},
    )
    device: str | None = field(default=None, metadata={"help": "torch device; default: cuda if there is one, else cpu"})
    name: str = field(default="", metadata={"help": "how others see this server; for people only"})
    lease_s: float = field(
        default=600.0, metadata={"help": "a session that says nothing for so long loses its pages", "unit": "seconds"}
    )
    resume_s: float = field(
        default=30.0,
        metadata={
            "help": "how long a session whose stream broke waits for its client, if nobody else needs its pages",
            "unit": "seconds",
        },
    )
    log_bytes: int = field(
        default=1 << 30,
        metadata={
            "help": "how much memory keeps what sessions sent to other servers, for those that replace them; more goes "
            "to temporary files",
            "unit": "bytes",
        },
    )
    peer_sessions: int = field(
        default=64,
        metadata={"help": "sessions that one peer may have open here while others have some", "unit": "sessions"},
    )
    peer_kv_share: float = field(
        default=0.5,
        metadata={
            "help": "share of the KV tokens that several sessions of one peer may have together while others have "
            "some; what it has beyond that yields to them"
        },
    )
    sharing: Sharing = field(
        default="client",
        metadata={
            "help": "whose sessions are not computed again what another had computed that began the same: client for "
            "those of the same client; all, which lets clients find out by its speed what others have asked; nobody"
        },
    )
    drain_s: float = field(
        default=30.0, metadata={"help": "how long sessions may still finish when the server leaves", "unit": "seconds"}
    )
    host: str = field(default="0.0.0.0", metadata={"help": "network interface to listen on"})
    port: int = field(default=31330, metadata={"help": "port to listen on; 0 for any that is free"})
    announce: tuple[str, ...] = field(
        default=(), metadata={"help": "addresses to tell others instead of those that were found"}
    )
    peers: tuple[str, ...] = field(
        default=(), metadata={"help": "addresses of peers of the swarm to join; none starts a new swarm"}
    )
    new_swarm: bool = field(
        default=False, metadata={"help": "start a new swarm, whatever the invite or the local network knows of one"}
    )
    identity: Path | None = field(
        default=None, metadata={"help": "file with the server's key, made if it is not there; default: a new key"}
    )
    settle_s: float = field(
        default=0.5,
        metadata={"help": "how long claims of servers that join together may take to spread", "unit": "seconds"},
    )
    look_s: float = field(
        default=10.0,
        metadata={"help": "look this often whether other blocks need this server more", "unit": "seconds"},
    )
    adapters: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "adapters to have ready for clients, LoRA or prefixes: directories in PEFT's format, published "
            "ones by id or name, or owner/name"
        },
    )
    adapter_bytes: int = field(
        default=256 << 20,
        metadata={
            "help": "memory lent to adapters, those of training clients among them; 0 to take none",
            "unit": "bytes",
        },
    )
    shelf_bytes: int = field(
        default=256 << 20,
        metadata={
            "help": "disk lent to adapters that others publish through this server; 0 to take none",
            "unit": "bytes",
        },
    )
    stay: bool = field(default=False, metadata={"help": "never move to other blocks; --blocks implies it"})

    def __post_init__(self) -> None:
        if self.blocks is not None and self.num_blocks is not None and len(self.blocks) != self.num_blocks:
            raise ConfigError(
                f"blocks {self.blocks} are {len(self.blocks)}, but num_blocks is {self.num_blocks}; give one"
            )
        if self.new_swarm and self.peers:
            raise ConfigError(
                f"new_swarm starts a swarm, and peers, {self.peers[0]}, are of one to join; give one of them"
            )
        for name in ("lease_s", "look_s", "resume_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be above 0 seconds")
        if self.peer_sessions < 1 or not 0 < self.peer_kv_share <= 1:
            raise ConfigError(
                f"peer_sessions is {self.peer_sessions} and peer_kv_share {self.peer_kv_share}; they must be at least "
                "1, and above 0 up to 1"
            )
        if self.log_bytes < 1:
            raise ConfigError(f"log_bytes is {self.log_bytes}; it must be above 0")
        for name in ("adapter_bytes", "shelf_bytes"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be 0 or above")
        if self.num_blocks is not None and self.num_blocks < 1:
            raise ConfigError(f"num_blocks is {self.num_blocks}; a server needs at least 1 block")

    @property
    def limits(self) -> PeerLimits:
        """What one peer may have."""
        return PeerLimits(self.peer_sessions, self.peer_kv_share, self.sharing)

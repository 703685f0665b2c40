"""A client's settings."""

import re
from dataclasses import dataclass, field
from typing import get_args

from corolla.codec import PREFERENCES
from corolla.errors import ConfigError
from corolla.routing import RoutingConfig, Trust
from corolla.terms import PEER_ID_PATTERN, Precision

__all__ = ["ClientConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientConfig(RoutingConfig):
    """How a client chooses servers and talks to them.

    Raises:
        ConfigError: If a value is impossible; says which and what is possible.
    """

    codec: str = field(
        default="half", metadata={"help": "how activations travel: raw, half, fp16, bf16 or int8; see docs/codecs.md"}
    )
    precision: Precision | None = field(
        default=None, metadata={"help": "what servers must hold their weights in; default: any"}
    )
    max_tokens: int = field(
        default=2048,
        metadata={"help": "tokens that a session is opened for when nothing else is known", "unit": "tokens"},
    )
    open_s: float = field(default=15.0, metadata={"help": "limit for opening a session", "unit": "seconds"})
    step_s: float = field(default=120.0, metadata={"help": "limit for one step at one server", "unit": "seconds"})
    request_s: float = field(
        default=300.0, metadata={"help": "limit for one forward or backward request at one server", "unit": "seconds"}
    )
    attempts: int = field(default=6, metadata={"help": "chains to try, one after another, before giving up"})
    push: bool = field(
        default=True,
        metadata={"help": "servers send outputs to each other where they can; if false, all goes by way of the client"},
    )
    piece_tokens: int = field(
        default=512,
        metadata={"help": "a prompt travels in pieces of so many tokens, each at another server", "unit": "tokens"},
    )
    log_bytes: int = field(
        default=256 << 20,
        metadata={
            "help": "how much a session keeps in memory of what it sent, for servers that replace others; more goes to "
            "a temporary file",
            "unit": "bytes",
        },
    )
    batch_tokens: int = field(
        default=4096, metadata={"help": "tokens of a training batch in one request", "unit": "tokens"}
    )
    allow_peers: tuple[str, ...] = field(
        default=(), metadata={"help": "peer ids of the servers to use, and no others; default: any"}
    )
    avoid_peers: tuple[str, ...] = field(default=(), metadata={"help": "peer ids of servers never to use"})
    trusted_peers: tuple[str, ...] = field(
        default=(), metadata={"help": "peer ids of servers that may have the blocks which trust reserves for them"}
    )
    trust: Trust = field(
        default="any",
        metadata={
            "help": "which blocks only trusted_peers may have: any for none; ends for the first and the last, whose "
            "states say most of a text; all"
        },
    )
    adapter: str | None = field(
        default=None,
        metadata={
            "help": "adapter to use: a directory in PEFT's format, a published one by id or name, or owner/name; "
            "default: none"
        },
    )
    chains: int = field(default=8, metadata={"help": "chains that a training batch is split over at most"})
    chain_tokens: int = field(
        default=256, metadata={"help": "tokens that each chain gets at least when a batch is split", "unit": "tokens"}
    )
    micro_tokens: int = field(
        default=256,
        metadata={
            "help": "a training batch travels in pieces of so many tokens through a chain of several servers, each "
            "piece at another server",
            "unit": "tokens",
        },
    )
    resume_s: float = field(
        default=10.0,
        metadata={
            "help": "how long a session waits for this machine's own connection to come back, if nobody can be reached",
            "unit": "seconds",
        },
    )
    chain_s: float = field(
        default=10.0,
        metadata={"help": "how long to wait for missing blocks or busy servers before giving up", "unit": "seconds"},
    )

    def __post_init__(self) -> None:
        if self.codec not in PREFERENCES:
            raise ConfigError(f"codec is {self.codec!r}; it must be one of {', '.join(PREFERENCES)}")
        for name in (
            "max_tokens",
            "open_s",
            "step_s",
            "request_s",
            "attempts",
            "batch_tokens",
            "chains",
            "chain_tokens",
            "log_bytes",
            "micro_tokens",
            "piece_tokens",
            "unknown_rtt_s",
            "hop_s",
            "unknown_block_s",
            "unknown_bytes_per_s",
        ):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be above 0")
        if not 0 <= self.spread <= 1:
            raise ConfigError(f"spread is {self.spread}; it is a share of a chain's cost, 0 to 1")
        if self.trust not in get_args(Trust):
            raise ConfigError(f"trust is {self.trust!r}; it must be one of {', '.join(get_args(Trust))}")
        if self.trust != "any" and not self.trusted_peers:
            raise ConfigError(f"trust is {self.trust}, but trusted_peers names nobody; name the servers you trust")
        for name in ("allow_peers", "avoid_peers", "trusted_peers"):
            if wrong := [peer for peer in getattr(self, name) if not re.fullmatch(PEER_ID_PATTERN, peer)]:
                raise ConfigError(f"{name} has {wrong[0]!r}, which is not a peer id: 52 letters and digits, as in logs")

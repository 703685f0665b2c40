"""The settings that only the command line has: how to chat, how to run the demo, how to write."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from corolla.errors import ConfigError
from corolla.telemetry.log import LevelName

__all__ = [
    "ChatConfig",
    "DemoConfig",
    "InviteConfig",
    "MetricsConfig",
    "OutputConfig",
    "ParentConfig",
    "ShareConfig",
    "SupervisorConfig",
    "TracesConfig",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatConfig:
    """Which model to talk to, and how it should answer. What is ``None`` is left to the model's own generation config.

    Raises:
        ConfigError: If a number is out of its range, or two values contradict each other.
    """

    model: str | None = field(
        default=None,
        metadata={"help": "a Hugging Face model, a directory, or smollm2; default: the only one that the swarm has"},
    )
    peers: tuple[str, ...] = field(default=(), metadata={"help": "addresses of peers of the swarm, as tls://host:port"})
    system: str | None = field(default=None, metadata={"help": "what the model is told before the first question"})
    prompt: str | None = field(default=None, metadata={"help": "the text to continue; default: standard input"})
    max_new_tokens: int = field(default=512, metadata={"help": "the longest answer", "unit": "tokens"})
    temperature: float | None = field(
        default=None, metadata={"help": "how freely to sample; below 1 is more predictable, above 1 less"}
    )
    top_p: float | None = field(
        default=None, metadata={"help": "sample only from the likeliest tokens that together have this probability"}
    )
    top_k: int | None = field(default=None, metadata={"help": "sample only from so many of the likeliest tokens"})
    seed: int | None = field(default=None, metadata={"help": "seed of the sampling; the same seed, the same answers"})
    greedy: bool = field(default=False, metadata={"help": "always take the likeliest token"})
    threads: int | None = field(
        default=None,
        metadata={"help": "CPU threads for the client's own part; default: torch's own choice", "unit": "threads"},
    )

    def __post_init__(self) -> None:
        sampling = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        given = [name for name, value in sampling.items() if value is not None]
        if self.greedy and given:
            raise ConfigError(f"greedy takes the likeliest token, so {given[0]} would mean nothing; give one of them")
        if self.temperature is not None and not self.temperature > 0:
            raise ConfigError(f"temperature is {self.temperature}; it must be above 0; for the likeliest token, greedy")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; it is a probability above 0 and up to 1")
        for name in ("max_new_tokens", "top_k", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoConfig:
    """A private swarm on this machine.

    Raises:
        ConfigError: If a number is out of its range.
    """

    model: str = field(default="smollm2", metadata={"help": "a Hugging Face model, a directory, or smollm2"})
    servers: int = field(
        default=3, metadata={"help": "server processes that share the model's blocks evenly", "unit": "processes"}
    )
    question: str = field(
        default="What is the capital of France?", metadata={"help": "the first question, asked for you"}
    )
    keep_logs: Path | None = field(
        default=None, metadata={"help": "directory for the servers' logs; default: one that is removed in the end"}
    )
    start_s: float = field(default=600.0, metadata={"help": "limit for all servers to be online", "unit": "seconds"})

    def __post_init__(self) -> None:
        if not 1 <= self.servers <= 64:
            raise ConfigError(f"servers is {self.servers}; the demo can start 1 to 64")


@dataclass(frozen=True, slots=True, kw_only=True)
class InviteConfig:
    """What invites to a private swarm of one's own say.

    Raises:
        ConfigError: If a number is out of its range.
    """

    swarm: str | None = field(
        default=None, metadata={"help": "name of a private swarm whose key this account has; default: the only one"}
    )
    id: str | None = field(default=None, metadata={"help": "an invite, or the beginning of its id"})
    allows: Literal["serve", "use", "both"] = field(default="both", metadata={"help": "what an invite allows"})
    expires_s: float = field(
        default=30 * 86400.0, metadata={"help": "for how long an invite holds, as in 30d, 12h or never", "unit": "time"}
    )
    name: str = field(default="", metadata={"help": "for whom an invite is; for its owner only"})
    peers: tuple[str, ...] = field(
        default=(),
        metadata={"help": "addresses of peers to start from, as tls://host:port; they become part of invites"},
    )

    def __post_init__(self) -> None:
        if not self.expires_s > 0:
            raise ConfigError(f"expires_s is {self.expires_s}; an invite holds for some time, or never ends")


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsConfig:
    """Where Prometheus may ask a server, a relay or a gateway.

    Raises:
        ConfigError: If the port is none.
    """

    port: int | None = field(
        default=None, metadata={"help": "answer Prometheus on this port; 0 for any that is free; default: do not"}
    )
    host: str = field(
        default="127.0.0.1", metadata={"help": "network interface for that; the default lets this machine alone ask"}
    )

    def __post_init__(self) -> None:
        if self.port is not None and not 0 <= self.port <= 65535:
            raise ConfigError(f"port is {self.port}; it is 0 to 65535")


@dataclass(frozen=True, slots=True, kw_only=True)
class TracesConfig:
    """Who is told how long each step of a session took, on each hop."""

    otlp: str | None = field(
        default=None,
        metadata={
            "help": "send traces to this collector by OTLP over HTTP, as http://127.0.0.1:4318/v1/traces; default: none"
        },
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputConfig:
    """How a command writes."""

    json: bool = field(default=False, metadata={"help": "write JSON to standard output, for programs"})
    quiet: bool = field(default=False, metadata={"help": "write results only: no progress, no stages"})
    debug: bool = field(default=False, metadata={"help": "show where in the code an error arose"})
    log_level: LevelName = field(default="warning", metadata={"help": "the lowest level of events to log"})
    log_json: bool = field(default=False, metadata={"help": "log one JSON object a line"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ParentConfig:
    """How a program that starts a server as its child steers it."""

    until_eof: bool = field(
        default=False, metadata={"help": "leave when standard input ends, and not at Ctrl-C, which is the parent's"}
    )
    peers_from_stdin: bool = field(
        default=False,
        metadata={"help": "read the addresses of peers from the first line of standard input, spaces between them"},
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisorConfig:
    """What to do when a server crashes.

    Raises:
        ConfigError: If a number is out of its range.
    """

    restart: bool = field(default=False, metadata={"help": "start the server again when it crashes"})
    longest_wait_s: float = field(
        default=60.0, metadata={"help": "waits before starting again double up to this", "unit": "seconds"}
    )

    def __post_init__(self) -> None:
        if self.longest_wait_s < 1:
            raise ConfigError(f"longest_wait_s is {self.longest_wait_s}; it must be at least 1 second")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShareConfig:
    """What to say of an adapter that is published, and where adapters lie.

    Raises:
        ConfigError: If a metric is not a name and a number.
    """

    adapter: str | None = field(
        default=None, metadata={"help": "a directory in PEFT's format, or a published adapter by its id or name"}
    )
    words: str = field(default="", metadata={"help": "words that must all be in an adapter's card"})
    place: str | None = field(
        default=None,
        metadata={"help": "a store: a directory, hf:owner/name, or swarm; default: this machine's own shelf"},
    )
    base: str | None = field(
        default=None,
        metadata={"help": "the model that the adapter is for; default: the one that PEFT has noted in it"},
    )
    name: str | None = field(default=None, metadata={"help": "what to call the adapter; default: its directory's name"})
    data: str = field(default="", metadata={"help": "what it was trained on, in a sentence or two"})
    metrics: tuple[str, ...] = field(default=(), metadata={"help": "what was measured, as name=number"})
    licence: str = field(default="", metadata={"help": "under which licence it is given away, as in Apache-2.0"})
    parent: str | None = field(default=None, metadata={"help": "id or name of the adapter that training began with"})
    identity: Path | None = field(
        default=None, metadata={"help": "file with the key to sign with, made if it is not there; default: one's own"}
    )
    out: Path | None = field(default=None, metadata={"help": "directory to copy the pulled adapter to, as well"})

    def __post_init__(self) -> None:
        _ = self.numbers

    @property
    def numbers(self) -> dict[str, float]:
        """What was measured, by name."""
        found = {}
        for metric in self.metrics:
            name, _, value = metric.partition("=")
            try:
                found[name.strip()] = float(value)
            except ValueError as error:
                raise ConfigError(f"the metric {metric!r} is no name=number, as in accuracy=0.91") from error
        return found

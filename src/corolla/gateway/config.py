"""The gateway's settings, and those of its API keys."""

from dataclasses import dataclass, field

from corolla.errors import ConfigError

__all__ = ["GatewayConfig", "KeyConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    """What the gateway offers, to whom, and how much of it at once.

    Raises:
        ConfigError: If a number is out of its range.
    """

    models: tuple[str, ...] = field(
        default=(), metadata={"help": "models to offer, as in corolla chat; default: the only one that the swarm has"}
    )
    adapters: tuple[str, ...] = field(
        default=(),
        metadata={"help": "adapters of these models, each offered as MODEL:ADAPTER; as in corolla chat --adapter"},
    )
    host: str = field(
        default="127.0.0.1", metadata={"help": "address to listen on; the default is reached from this machine only"}
    )
    port: int = field(default=8000, metadata={"help": "port to listen on; 0 for any free one"})
    database: str | None = field(
        default=None,
        metadata={
            "help": "where keys and usage are kept: a URL, as postgresql://user:password@host/name, which several "
            "gateways may share; default: an SQLite file in the data directory of this account",
            "secret": True,
        },
    )
    cors_origins: tuple[str, ...] = field(
        default=(), metadata={"help": "web pages of other origins that may use the gateway, as https://example.org"}
    )
    max_answers: int = field(
        default=64, metadata={"help": "answers that are computed at once; a request over it is told to come back"}
    )
    max_choices: int = field(default=16, metadata={"help": "answers that one request may ask for"})
    max_messages: int = field(default=1000, metadata={"help": "messages that one request may have"})
    max_body_bytes: int = field(default=4 << 20, metadata={"help": "longest body of a request", "unit": "bytes"})
    max_answer_tokens: int = field(
        default=8192, metadata={"help": "longest answer, and the limit where a chat gives none", "unit": "tokens"}
    )
    kept_sessions: int = field(
        default=32, metadata={"help": "sessions kept on servers between the turns of chats, for all keys together"}
    )
    kept_s: float = field(default=300.0, metadata={"help": "how long such a session is kept", "unit": "seconds"})

    def __post_init__(self) -> None:
        for name in ("max_answers", "max_choices", "max_messages", "max_body_bytes", "max_answer_tokens", "kept_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be above 0")
        if self.kept_sessions < 0:
            raise ConfigError(f"kept_sessions is {self.kept_sessions}; it is 0, for none, or more")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port is {self.port}; it is 0 to 65535")


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyConfig:
    """An API key of the gateway.

    Raises:
        ConfigError: If a number is out of its range.
    """

    id: str | None = field(default=None, metadata={"help": "the id of a key, as corolla gateway keys list shows it"})
    name: str = field(default="", metadata={"help": "for whom a key is; for its owner only"})
    requests_per_min: int | None = field(
        default=None, metadata={"help": "requests a minute that a key allows; default: any number"}
    )
    tokens_per_day: int | None = field(
        default=None,
        metadata={"help": "tokens a day, read and written, that a key allows; default: any number", "unit": "tokens"},
    )

    def __post_init__(self) -> None:
        for name in ("requests_per_min", "tokens_per_day"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")

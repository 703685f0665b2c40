"""The engine's settings."""

from dataclasses import dataclass, field, fields

from corolla.errors import ConfigError

__all__ = ["EngineConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How a server computes. A value of ``None`` is resolved from the machine when the engine is made, and logged.

    Raises:
        ConfigError: If a number is not positive.
    """

    threads: int | None = field(
        default=None, metadata={"help": "CPU threads that compute; default: torch's own choice", "unit": "threads"}
    )
    kv_bytes: int | None = field(
        default=None,
        metadata={"help": "memory lent to sessions; default: half of what is free after loading", "unit": "bytes"},
    )
    kept_bytes: int = field(
        default=256 << 20,
        metadata={
            "help": "how much of the memory lent to sessions keeps, while none needs it, what ended ones have "
            "computed, for those that begin with the same",
            "unit": "bytes",
        },
    )
    tick_tokens: int = field(
        default=512,
        metadata={
            "help": "tokens computed at once; a long prompt waits for the others after so many",
            "unit": "tokens",
        },
    )
    tick_ms: int = field(
        default=200,
        metadata={
            "help": "while others decode, a long prompt is computed for about so long until they have their next token",
            "unit": "milliseconds",
        },
    )
    forward_tokens: int = field(
        default=1024,
        metadata={"help": "tokens of a training batch computed at once, if not a single row", "unit": "tokens"},
    )
    graph_bytes: int | None = field(
        default=None,
        metadata={
            "help": "memory for what a training batch computes on the way forward and needs on the way back; what it "
            "cannot hold is computed again, which takes a third longer; default: an eighth of what is free",
            "unit": "bytes",
        },
    )
    steps_per_forward: int = field(
        default=4,
        metadata={"help": "ticks that sessions get for each one that training gets, when both wait", "unit": "ticks"},
    )
    queue_length: int = field(
        default=1024, metadata={"help": "requests that may wait; more are told to come back", "unit": "requests"}
    )

    def __post_init__(self) -> None:
        for setting in fields(self):
            value = getattr(self, setting.name)
            if value is not None and value < 1:
                raise ConfigError(f"{setting.name} is {value}; it must be at least 1 {setting.metadata['unit']}")

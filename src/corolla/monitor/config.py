"""The settings of the monitor. Reads no file and no environment."""

from dataclasses import dataclass, field
from pathlib import Path

from corolla.errors import ConfigError

__all__ = ["MonitorConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MonitorConfig:
    """Where the monitor's page is served, and what is remembered.

    Raises:
        ConfigError: If a number is out of its range.
    """

    host: str = field(
        default="127.0.0.1",
        metadata={"help": "network interface to serve the page on; the default lets this machine alone see it"},
    )
    port: int = field(default=31380, metadata={"help": "port of the page; 0 for any that is free"})
    title: str = field(default="", metadata={"help": "what the page calls this swarm"})
    show_addresses: bool = field(
        default=False, metadata={"help": "show where servers can be dialled to whoever sees the page"}
    )
    database: Path | None = field(
        default=None,
        metadata={"help": "SQLite file for what was; default: monitor.sqlite where this account keeps its state"},
    )
    sample_s: int = field(default=30, metadata={"help": "note how the swarm is this often", "unit": "seconds"})
    keep_s: float = field(default=90 * 86400.0, metadata={"help": "forget what is older than this", "unit": "seconds"})
    max_events: int = field(default=20_000, metadata={"help": "remember so many events, the newest", "unit": "events"})
    measure_s: float = field(
        default=10.0, metadata={"help": "measure the way to each server this often", "unit": "seconds"}
    )
    max_viewers: int = field(default=256, metadata={"help": "pages that are kept up to date at once", "unit": "pages"})

    def __post_init__(self) -> None:
        for name in ("sample_s", "keep_s", "max_events", "measure_s", "max_viewers"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be above 0")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port is {self.port}; it must be 0 to 65535")

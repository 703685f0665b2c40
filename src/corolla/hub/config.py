"""The settings of this room: where files are kept, and what may be downloaded."""

from dataclasses import dataclass, field
from pathlib import Path

from platformdirs import user_cache_path

__all__ = ["HubConfig"]


def _default_cache() -> Path:
    return user_cache_path("corolla", appauthor=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class HubConfig:
    """Where model files are kept, and what may be downloaded.

    Args:
        cache_dir: Where files are kept; its parts are ``hub`` (downloads), ``views`` (links to the files of one
            span), ``rounded`` (weights that servers have rounded), ``listings`` and ``hashes`` (what is known about
            files), ``adapters`` (those that were published or pulled), and ``smollm2`` (the demo model).
        offline: Whether to use only what is on this disk already.
        max_disk_bytes: What downloaded and rounded weights may occupy, in bytes; ``None`` for no limit but the disk's.
        endpoint: The address of the hub; ``None`` for Hugging Face's.
    """

    cache_dir: Path = field(
        default_factory=_default_cache, metadata={"help": "Directory for downloaded and converted model files."}
    )
    offline: bool = field(default=False, metadata={"help": "Use only files that are on this disk already."})
    max_disk_bytes: int | None = field(
        default=None,
        metadata={
            "help": "Most bytes that downloaded and rounded weights may occupy; the least recently used make room for "
            "new ones."
        },
    )
    endpoint: str | None = field(
        default=None, metadata={"help": "Address of a mirror of the Hugging Face hub, as in https://hub.example."}
    )

    @property
    def downloads(self) -> Path:
        """Where downloaded files lie, in the layout of Hugging Face's cache."""
        return self.cache_dir / "hub"

    @property
    def views(self) -> Path:
        """Where directories of links to the files of one span lie."""
        return self.cache_dir / "views"

    @property
    def rounded(self) -> Path:
        """Where weights lie that were rounded once and need not be again."""
        return self.cache_dir / "rounded"

    @property
    def adapters(self) -> Path:
        """Where adapters lie that were pulled from elsewhere, or published from here."""
        return self.cache_dir / "adapters"

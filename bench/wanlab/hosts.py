"""What a lab is made of: hosts, their access links, and how far apart regions are. Pure."""

import json
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal, NamedTuple, get_args

__all__ = ["PRESETS", "RTT_MS", "SETTINGS", "Host", "NatKind", "Topology", "read_topology"]

NatKind = Literal["", "full-cone", "port-restricted", "symmetric"]
"""Which home router a host is behind; none if empty."""

PRESETS: Final = Path(__file__).parent / "presets"

RTT_MS: Final = MappingProxyType(
    {
        "eu eu": 12.0,
        "us-east us-east": 12.0,
        "us-west us-west": 12.0,
        "asia asia": 30.0,
        "eu us-east": 85.0,
        "eu us-west": 145.0,
        "asia eu": 220.0,
        "us-east us-west": 65.0,
        "asia us-east": 190.0,
        "asia us-west": 110.0,
    }
)
"""Round trips between regions in ms, unless a topology gives its own."""

SETTINGS: Final = ("up_mbit", "down_mbit", "delay_ms", "jitter_ms", "loss", "queue_ms")
"""The fields of a host that can be changed while the lab is up."""


@dataclass(frozen=True, slots=True)
class Host:
    """A machine and its access link, whose delay, jitter and loss hold each way.

    Args:
        name: Letters, digits, ``-`` and ``_``.
        region: A key of :data:`RTT_MS`, or of the topology's own.
        nat: The home router that it is behind.
        up_mbit: The uplink's rate; 0 for no limit.
        down_mbit: The downlink's rate.
        delay_ms: One way.
        jitter_ms: The standard deviation of the delay.
        loss: In percent.
        queue_ms: A packet that would wait longer for the link is dropped.

    Raises:
        ValueError: If the name or the kind of router is none.
    """

    name: str
    region: str = ""
    nat: NatKind = ""
    up_mbit: float = 0.0
    down_mbit: float = 0.0
    delay_ms: float = 0.0
    jitter_ms: float = 0.0
    loss: float = 0.0
    queue_ms: float = 100.0

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w-]{1,60}", self.name):
            raise ValueError(f"{self.name!r} is no name of a host; use letters, digits, - and _")
        if self.nat not in get_args(NatKind):
            raise ValueError(f"{self.nat!r} is no kind of router; use one of {', '.join(get_args(NatKind)[1:])}")


class Topology(NamedTuple):
    """What a file says of a lab.

    Args:
        hosts: The machines.
        options: Further arguments of :class:`~bench.wanlab.lab.Lab`.
    """

    hosts: Sequence[Host]
    options: dict[str, Any]


def read_topology(source: str | Path, count: int | None = None) -> Topology:
    """Read a TOML or JSON file, or a preset.

    Args:
        source: A file with a suffix, or the name of a preset.
        count: Resizes groups of hosts that have a count.
    """
    file = Path(source)
    if not file.suffix:
        file = PRESETS / f"{source}.toml"
    text = file.read_text(encoding="utf-8")
    spec = tomllib.loads(text) if file.suffix == ".toml" else json.loads(text)
    defaults, hosts = spec.pop("defaults", {}), []
    for name, entry in spec.pop("hosts").items():
        fields = {**defaults, **entry}
        size = fields.pop("count", None)
        host = Host(**{**fields, "name": name})
        hosts += [replace(host, name=f"{name}{i + 1}") for i in range(count or size)] if size else [host]
    return Topology(hosts, spec)

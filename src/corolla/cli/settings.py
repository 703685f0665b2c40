"""Where every setting comes from: defaults, below a file, below the environment, below flags.

The only reader of the environment. Owns the merging and remembers the origin of each value; what a setting means is
known to the room that has it.
"""

import difflib
import importlib
import json
import math
import os
import re
import tomllib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec
from platformdirs import user_config_path

from corolla.errors import ConfigError
from corolla.terms import Span

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = [
    "SECTIONS",
    "Given",
    "Setting",
    "Settings",
    "field_of",
    "hint_of",
    "kind_of",
    "limit_kernels",
    "load_settings",
    "parse_bytes",
    "parse_seconds",
    "shown_type",
    "write_file",
]

_KERNELS = 24
"""Those of a decode step, four for each number of sessions that is met."""

SECTIONS = {
    "server": "corolla.server:ServerConfig",
    "engine": "corolla.engine:EngineConfig",
    "swarm": "corolla.swarm:SwarmConfig",
    "relay": "corolla.swarm:RelayConfig",
    "light": "corolla.swarm:LightConfig",
    "hub": "corolla.hub:HubConfig",
    "client": "corolla.client:ClientConfig",
    "monitor": "corolla.monitor:MonitorConfig",
    "chat": "corolla.cli.config:ChatConfig",
    "demo": "corolla.cli.config:DemoConfig",
    "gateway": "corolla.gateway:GatewayConfig",
    "key": "corolla.gateway:KeyConfig",
    "invite": "corolla.cli.config:InviteConfig",
    "share": "corolla.cli.config:ShareConfig",
    "metrics": "corolla.cli.config:MetricsConfig",
    "traces": "corolla.cli.config:TracesConfig",
    "output": "corolla.cli.config:OutputConfig",
    "parent": "corolla.cli.config:ParentConfig",
    "supervisor": "corolla.cli.config:SupervisorConfig",
}
"""The name of each section in the file, and the frozen dataclass that has its settings; imported when it is needed."""

_TYPES: dict[object, str] = {
    bool: "true or false",
    int: "number",
    float: "number",
    str: "text",
    Path: "path",
    Span: "start:stop",
}
_PREFIX = "COROLLA_"
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kKMGT])(i?)B|B)?")
_TIME = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|h|d|w)?")
_UNITS_S = {"s": 1, "min": 60, "h": 3600, "d": 86400, "w": 604800}
_POWERS = {None: 0, "K": 1, "M": 2, "G": 3, "T": 4}

_C = TypeVar("_C")


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting as it was merged.

    Args:
        key: ``section.name``.
        value: What it is set to; not in the representation, because it may be secret.
        origin: Where that comes from, in words.
        is_secret: Whether it must not be shown.
    """

    key: str
    value: object = field(repr=False)
    origin: str
    is_secret: bool = False

    @property
    def shown(self) -> str:
        """The value as a person may see it."""
        if self.is_secret and self.value is not None:
            return "(hidden)"
        if isinstance(self.value, tuple):
            return " ".join(map(str, self.value))
        return "" if self.value is None or self.value is MISSING else str(self.value)


class Given(NamedTuple):
    """What one source says about one setting.

    Args:
        key: ``section.name``.
        value: As it was found.
        origin: Where, in words.
        is_text: Whether everything is text there, numbers as well.
    """

    key: str
    value: object
    origin: str
    is_text: bool


class Settings:
    """Merged settings.

    Args:
        merged: Every setting of the sections that were asked for.
        file: The file that was named, if one was.
    """

    def __init__(self, merged: Collection[Setting], file: Path | None) -> None:
        self.all = tuple(merged)
        self.file = file

    def get(self, kind: type[_C]) -> _C:
        """Make the configuration of a room.

        Args:
            kind: Its dataclass.

        Raises:
            ConfigError: If a setting without default was not given, or the settings contradict each other.
        """
        section = next(name for name, home in SECTIONS.items() if home.endswith(f":{kind.__name__}"))
        own = {setting.key.partition(".")[2]: setting for setting in self.all if _section(setting.key) == section}
        if missing := [setting.key for setting in own.values() if setting.value is MISSING]:
            raise ConfigError(f"{missing[0]} has no default: give it to the command, or set {_variable(missing[0])}")
        return kind(**{name: setting.value for name, setting in own.items()})


def load_settings(
    sections: Sequence[str] = tuple(SECTIONS),
    *,
    flags: Iterable[Given] = (),
    file: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Settings:
    """Merge the settings of some sections.

    Args:
        sections: Which; the keys of the others are not looked at.
        flags: What the command line says.
        file: The file to read; ``None`` for the one in the configuration directory of this account, if it is there.
        environment: Variables by name; ``None`` for those of this process.

    Raises:
        ConfigError: If a key is unknown, a value is not what its setting takes, or the file cannot be read.
    """
    known = {f"{name}.{one.name}": one for name in sections for one in fields(kind_of(name))}
    merged = {key: Setting(key, _default(one), "default", _is_secret(one)) for key, one in known.items()}
    variables = os.environ if environment is None else environment
    for given in [*_read_file(file, known), *_read_environment(variables, known), *flags]:
        merged[given.key] = Setting(given.key, _convert(given), given.origin, merged[given.key].is_secret)
    return Settings(merged.values(), file)


def limit_kernels() -> None:
    """Let oneDNN keep the machine code of few products, unless the environment says otherwise.

    It would keep 1,024 of them, 0.6 MB each, and hears of another limit only by a variable that it reads at its first
    product. To make one again takes 0.5 ms.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(_KERNELS))


def kind_of(section: str) -> "type[DataclassInstance]":
    """Give the dataclass of a section; its room is imported for it."""
    module, _, name = SECTIONS[section].partition(":")
    kind: type[DataclassInstance] = getattr(importlib.import_module(module), name)
    return kind


def field_of(key: str) -> "Field[Any]":
    """Give the dataclass field of ``section.name``: its help, unit and default."""
    section, _, name = key.partition(".")
    return next(one for one in fields(kind_of(section)) if one.name == name)


def hint_of(key: str) -> object:
    """Give the type of ``section.name``, without the ``None`` that many allow."""
    section, _, name = key.partition(".")
    hint = get_type_hints(kind_of(section))[name]
    if get_origin(hint) in {UnionType, Union}:
        (hint,) = (one for one in get_args(hint) if one is not type(None))
    return hint


def shown_type(key: str) -> str:
    """Say in a word what ``section.name`` takes."""
    hint = hint_of(key)
    if get_origin(hint) is Literal:
        return " or ".join(get_args(hint))
    return "list of text" if get_origin(hint) is tuple else _TYPES[hint]


def parse_bytes(text: str) -> int:
    """Read a number of bytes as people write it: ``2GiB``, ``500 MB``, ``1048576``.

    Raises:
        ValueError: If it is none.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"a number of bytes is written as in 2GiB, 500MB or 1048576, not {text!r}")
    number, prefix, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** _POWERS[prefix and prefix.upper()])


def parse_seconds(text: str) -> float:
    """Read a length of time as people write it: ``30d``, ``12 h``, ``90``, ``never``.

    Raises:
        ValueError: If it is none.
    """
    if text.strip() == "never":
        return math.inf
    match = _TIME.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"a length of time is written as in 30d, 12h, 10min, 90s or 90, not {text!r}")
    return float(match[1]) * _UNITS_S[match[2] or "s"]


def write_file(path: Path, settings: Settings, sections: Collection[str]) -> None:
    """Write a file from which a child process gets the settings of some sections, and nothing else from files.

    Args:
        path: Where to.
        settings: The settings of this process.
        sections: Which of them to pass on.
    """
    lines = []
    for section in sections:
        own = [one for one in settings.all if _section(one.key) == section and one.origin != "default"]
        lines += [f"[{section}]", *(f"{one.key.partition('.')[2]} = {_write(one.value)}" for one in own)]
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")


def _section(key: str) -> str:
    return key.partition(".")[0]


def _variable(key: str) -> str:
    return _PREFIX + key.replace(".", "_").upper()


def _write(value: object) -> str:
    """Write a value as TOML; its strings, numbers, booleans and lists are JSON's."""
    return json.dumps(value, default=str, ensure_ascii=False)


def _is_secret(one: "Field[Any]") -> bool:
    return bool(one.metadata.get("secret"))


def _default(one: "Field[Any]") -> object:
    return one.default if one.default_factory is MISSING else one.default_factory()


def _read_file(file: Path | None, known: Collection[str]) -> list[Given]:
    path = file or user_config_path("corolla", appauthor=False) / "corolla.toml"
    if file is None and not path.is_file():
        return []
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"the settings in {path} cannot be read: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    found = []
    for section, table in tables.items():
        if section not in SECTIONS:
            raise ConfigError(f"{path} has an unknown section [{section}]{_nearest(section, SECTIONS)}")
        if not isinstance(table, dict):
            raise ConfigError(f"{path}: {section} is a section; write [{section}] and its settings below")
        for name, value in table.items():
            if _is_unknown(f"{section}.{name}", known):
                raise ConfigError(
                    f"{path} has an unknown setting {section}.{name}{_nearest(f'{section}.{name}', known)}"
                )
            if f"{section}.{name}" in known:
                found.append(Given(f"{section}.{name}", value, f"file {path}", is_text=False))
    return found


def _read_environment(environment: Mapping[str, str], known: Collection[str]) -> list[Given]:
    found = []
    for variable, text in environment.items():
        if not variable.upper().startswith(_PREFIX):  # Windows knows variables in upper case only
            continue
        section, _, name = variable[len(_PREFIX) :].lower().partition("_")
        key = f"{section}.{name}"
        if section not in SECTIONS:
            near = _nearest(f"{_PREFIX}{section}".upper(), [_PREFIX + one.upper() for one in SECTIONS])
            raise ConfigError(f"the environment has {variable}, which is of an unknown section{near}")
        if _is_unknown(key, known):
            near = _nearest(_variable(key), [_variable(one) for one in known])
            raise ConfigError(f"the environment has an unknown setting {variable}{near}")
        if key in known:
            found.append(Given(key, text, f"environment {variable}", is_text=True))
    return found


def _is_unknown(key: str, known: Collection[str]) -> bool:
    """Say whether a key is in one of the sections that were asked for, but none of theirs."""
    return key not in known and _section(key) in {_section(one) for one in known}


def _nearest(word: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else "; corolla config lists all"


def _convert(given: Given) -> object:
    try:
        return _to_type(hint_of(given.key), given)
    except (ValueError, TypeError) as error:  # msgspec's own errors are ValueErrors as well
        shown = "" if _is_secret(field_of(given.key)) else f" is {given.value!r}"
        raise ConfigError(f"{given.key}{shown} ({given.origin}): {error}") from error


def _to_type(hint: object, given: Given) -> object:
    value = given.value
    if hint is Span:
        return Span.parse(msgspec.convert(value, str))
    if hint is Path:
        return Path(msgspec.convert(value, str)).expanduser()
    if given.key.endswith("_bytes") and isinstance(value, str):
        return parse_bytes(value)
    if given.key.endswith("_s") and hint is float and isinstance(value, str):
        return parse_seconds(value)
    if get_origin(hint) is tuple and given.is_text and isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    return msgspec.convert(value, hint, strict=not given.is_text)

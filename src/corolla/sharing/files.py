"""An adapter in a directory, in PEFT's format: read without trust, and bound to the weights that it is for.

Only safetensors, and only settings that cannot have anything imported or run. Knows files; not who uses them.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, cast, get_args

from safetensors import SafetensorError, safe_open

from corolla.errors import BadAdapter, Error, WrongBase
from corolla.hub import HubConfig, Repository, open_repository
from corolla.sharing.card import CARD_FILE, MAX_CARD_BYTES, Card, FileEntry, FileName, Method
from corolla.terms import ModelId

__all__ = ["FILES", "AdapterFiles", "describe_files", "open_files"]

FILES: Final[tuple[FileName, ...]] = get_args(FileName)
_MAX_CONFIG_BYTES: Final = 64 << 10
_MAX_WEIGHT_BYTES: Final = 4 << 30
_MAX_RANKS: Final = 4096
_MAX_NAMES: Final = 1024
_REACHING_OUT: Final = ("auto_mapping", "megatron_config", "tokenizer_kwargs", "eva_config", "corda_config")
"""Settings by which PEFT would import modules or load data that the adapter names."""


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter that lies in a directory.

    Args:
        directory: Where.
        settings: Its ``adapter_config.json``.
        card: What its author says of it; ``None`` if it was never published.
    """

    directory: Path
    settings: dict[str, Any]
    card: Card | None

    @property
    def label(self) -> str:
        """By which servers announce it: as its card says, or the directory's name."""
        return self.directory.name[-128:] if self.card is None else self.card.label

    @property
    def method(self) -> Method:
        """How it was trained."""
        return cast("Method", self.settings["peft_type"].lower())

    def check_base(self, model: ModelId, name: str, hub: HubConfig) -> None:
        """Refuse to be added to other weights than those that it was trained on.

        A card says which these are. Without one, PEFT's own file names a model: the same name is taken for the same
        model, and another one is looked up, without going online.

        Args:
            model: The weights that it is to be added to.
            name: What they are called.
            hub: Where models are kept.

        Raises:
            WrongBase: If they are others, or if nobody can tell.
        """
        if self.card is not None:
            if self.card.base != model:
                raise WrongBase(
                    f"the adapter {self.label} is for {self.card.base_name} ({self.card.base[:12]}), not for {name} "
                    f"({model[:12]}); use it with the former"
                )
            return
        base = self.settings.get("base_model_name_or_path")
        if not base or base.partition("@")[0] == name.partition("@")[0]:
            return
        found = _look_up(base, hub)
        if found == model:
            return
        if found is not None:
            raise WrongBase(
                f"the adapter in {self.directory} is for {base} ({found[:12]}), not for {name} ({model[:12]}); use it "
                "with the former"
            )
        raise WrongBase(
            f"the adapter in {self.directory} is for {base}, which is not on this disk, so nobody can tell whether "
            f"{name} is the same; if it is, publish it as such: corolla hub push {self.directory} --base {name}"
        )


def open_files(directory: Path) -> AdapterFiles:
    """Read what an adapter is, and check all of it but its numbers.

    Args:
        directory: Holds ``adapter_config.json``, ``adapter_model.safetensors``, and the card if it has one.

    Raises:
        BadAdapter: If it is no adapter in PEFT's format, or unsafe, or not what its card says.
    """
    for name in FILES:
        if not (directory / name).is_file():
            raise BadAdapter(f"{directory} is no adapter in PEFT's format: it has no {name}")
    settings = _read_settings(directory / "adapter_config.json")
    _check_weights(directory / "adapter_model.safetensors")
    card = None
    try:
        if (directory / CARD_FILE).is_file():
            with (directory / CARD_FILE).open("rb") as file:
                card = Card.read(file.read(MAX_CARD_BYTES + 1))
            for name in FILES:
                card.check_file(name, *_measure(directory / name))
    except OSError as error:
        raise BadAdapter(f"{directory} cannot be read: {error}; check its permissions") from error
    files = AdapterFiles(directory, settings, card)
    if card is not None and card.method != files.method:
        raise BadAdapter(f"the card of adapter {card.label} says {card.method}, its files {files.method}")
    return files


def describe_files(files: AdapterFiles, repository: Repository, **said: Any) -> Card:
    """Write the card of an adapter, not signed yet.

    Args:
        files: The adapter.
        repository: The model that it is for.
        **said: What its author says: ``name``, ``data``, ``metrics``, ``licence`` and ``parent``, as in :class:`Card`.
    """
    entries = {}
    for name in FILES:
        size_bytes, sha256 = _measure(files.directory / name)
        entries[name] = FileEntry(sha256, size_bytes)
    return Card(
        base=repository.model_id,
        base_name=repository.name[-128:],
        base_revision=repository.revision,
        method=files.method,
        files=entries,
        author="",  # type: ignore[arg-type]  # whoever signs it
        **said,
    )


def _look_up(base: str, hub: HubConfig) -> ModelId | None:
    try:
        return open_repository(base, config=replace(hub, offline=True)).model_id
    except (Error, OSError, ValueError):
        return None


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_CONFIG_BYTES + 1)
        if len(data) > _MAX_CONFIG_BYTES:
            raise BadAdapter(f"{path} is over {_MAX_CONFIG_BYTES} bytes, which no adapter's settings are")
        settings = json.loads(data)
    except (OSError, ValueError, RecursionError) as error:
        raise BadAdapter(f"{path} holds no adapter's settings: {error}") from error
    if not isinstance(settings, dict):
        raise BadAdapter(f"{path} holds no adapter's settings")
    method = settings.get("peft_type")
    if not isinstance(method, str) or method.lower() not in get_args(Method):
        raise BadAdapter(f"{path} is of method {method!r}; known are {', '.join(get_args(Method))}")
    if reaching := [name for name in _REACHING_OUT if settings.get(name)]:
        raise BadAdapter(f"{path} sets {reaching[0]}, which would run or load other things than the adapter; remove it")
    base = settings.get("base_model_name_or_path")
    if base is not None and not (isinstance(base, str) and len(base) <= _MAX_NAMES):
        raise BadAdapter(f"{path} names no model by base_model_name_or_path")
    _check_sizes(path, settings)
    return settings


def _check_sizes(path: Path, settings: dict[str, Any]) -> None:
    """Refuse numbers that would have PEFT make room for far more than there is in the file."""
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = settings.get(name) or {}
        if not isinstance(patterns, dict) or len(patterns) > _MAX_NAMES:
            raise BadAdapter(f"{path} has a {name} that is none")
    targets = settings.get("target_modules") or []
    if not isinstance(targets, list | str) or len(targets) > _MAX_NAMES:
        raise BadAdapter(f"{path} has more than {_MAX_NAMES} target_modules")
    sizes = [settings.get(name) for name in ("r", "num_virtual_tokens")]
    sizes += (settings.get("rank_pattern") or {}).values()
    for size in sizes:
        if size is not None and not (isinstance(size, int) and 0 < size <= _MAX_RANKS):
            raise BadAdapter(f"{path} has a rank or a number of tokens of {size!r}; it must be 1 to {_MAX_RANKS}")


def _check_weights(path: Path) -> None:
    try:
        size_bytes = path.stat().st_size
        if size_bytes > _MAX_WEIGHT_BYTES:
            raise BadAdapter(f"{path} has {size_bytes} bytes; adapters have {_MAX_WEIGHT_BYTES} at most")
        with safe_open(path, framework="np") as file:
            if not list(file.keys()):
                raise BadAdapter(f"{path} holds no tensors")
    except (OSError, SafetensorError) as error:
        raise BadAdapter(f"{path} is no safetensors file: {error}") from error


def _measure(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), digest

"""Opening a model by name, wherever it lies, and reading its configuration and tokenizer.

Owns what a name means: the demo model, a directory, or a model on the hub. It must not know which tensors a span needs:
its caller maps them to files through ``weight_map`` and asks for those.
"""

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from corolla.errors import BadCheckpoint, ModelNotFound
from corolla.hub.config import HubConfig
from corolla.hub.demo import DEMO_NAME, demo_directory, open_demo
from corolla.hub.disk import using_cache
from corolla.hub.local import open_directory
from corolla.hub.manifest import Manifest
from corolla.hub.progress import Progress, stay_silent
from corolla.hub.remote import open_remote
from corolla.terms import ModelId

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Repository", "load_tokenizer", "open_repository"]

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


class Repository(Protocol):
    """The files of one model, opened: small ones at hand, weights on request."""

    name: str
    """What the user calls it."""

    revision: str | None
    """The commit that it is pinned to, where there is one."""

    manifest: Manifest
    """What the model is."""

    model_id: ModelId
    """The hash of the manifest: what servers and clients must agree on."""

    weight_map: Mapping[str, str]
    """The name of every tensor in the checkpoint, and of the file that holds it."""

    def fetch(self, files: Iterable[str]) -> Path:
        """Bring weight files onto this disk, and nothing else.

        Args:
            files: Some of the values of ``weight_map``.

        Returns:
            A directory from which transformers can load them: configuration, tokenizer and at least those files, with
            an index of what is there. It is shared: read it, never write to it.

        Raises:
            UsageError: If a file is none of the model's.
            CapacityError: If there is no room for them.
            ModelError: If they cannot be had.
            BadCheckpoint: If they are not what the manifest says.
        """

    def metadata_directory(self) -> Path:
        """Return a directory that holds configuration and tokenizer, and perhaps weights.

        Raises:
            CapacityError: If there is no room for them.
            ModelError: If they cannot be had.
        """


def open_repository(name: str, *, config: HubConfig, report: Progress | None = None) -> Repository:
    """Open a model by name; its weights stay where they are until they are fetched.

    Args:
        name: The first of these that it can be: ``smollm2``, the demo model; a directory; a model on the hub as
            ``owner/name``, or as ``owner/name@revision``.
        config: Where files go, and whether to go online.
        report: Told how far long tasks are.

    Returns:
        The repository.

    Raises:
        ModelNotFound: If nothing goes by that name.
        ModelError: If it cannot be had: no network, no access, no demo package.
        BadCheckpoint: If files are missing, damaged or unsafe.
        CapacityError: If the cache directory is full or cannot be written.
    """
    with using_cache(config):
        return _open(name, config, report or stay_silent)


def _open(name: str, config: HubConfig, report: Progress) -> Repository:
    directory = Path(os.path.expanduser(name))
    is_there = name != "" and directory.is_dir()
    if name == DEMO_NAME or (is_there and directory.resolve() == demo_directory(config).resolve()):
        return open_demo(config, report)
    if is_there:
        return open_directory(directory.resolve(), name, config, report)
    if _HUB_NAME.fullmatch(name):
        return open_remote(name, config, report)
    raise ModelNotFound(
        f"no model goes by {name!r}: it is no directory, nor does it look like owner/name on the hub; "
        f"{_suggest(name, directory)}try {DEMO_NAME}, the demo model"
    )


def _suggest(name: str, directory: Path) -> str:
    beside = [path.name for path in directory.parent.iterdir() if path.is_dir()] if directory.parent.is_dir() else []
    near = difflib.get_close_matches(directory.name, [DEMO_NAME, *beside], n=3)
    return f"did you mean {' or '.join(near)}? Else " if near else ""


def load_tokenizer(repository: Repository) -> "PreTrainedTokenizerBase":
    """Read the tokenizer of a model.

    Args:
        repository: The model.

    Returns:
        Its tokenizer.

    Raises:
        BadCheckpoint: If it has none, or a malformed one, or one that needs code of its own.
        ModelError: If it cannot be had.
    """
    from transformers import AutoTokenizer

    directory = repository.metadata_directory()
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise BadCheckpoint(
            f"{repository.name} has no tokenizer that can be loaded without running its own code: {error}"
        ) from error

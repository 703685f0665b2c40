"""Weights that were rounded once, kept on this disk: a file a block, found by what it was made of, checked by its hash.

Whatever decides what rounding gives is part of a file's name, so a file of another model, precision, machine or version
is never found. Knows tensors by their names; not what they are.
"""

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from corolla.errors import CapacityError
from corolla.hub.config import HubConfig
from corolla.hub.disk import make_room, mark_used
from corolla.telemetry import event, logger

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["RoundedWeights"]

_LOG = logger(__name__)


class RoundedWeights:
    """The rounded blocks of one model, in one precision, on this machine.

    Args:
        config: Says where files are kept, and how much they may occupy.
        facts: Whatever decides what rounding gives: model, precision, machine, versions.
    """

    def __init__(self, config: HubConfig, facts: object) -> None:
        self._config = config
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
        self._directory = config.rounded / key

    def find(self, blocks: Iterable[int]) -> "dict[int, dict[str, Tensor]] | None":
        """Read blocks; ``None`` unless all are there and are, by their hashes, what was written. Blocks.

        Args:
            blocks: Which.
        """
        from safetensors.torch import load_file

        found = {}
        for block in blocks:
            path = self._path(block)
            try:
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                if digest != path.with_suffix(".sha256").read_text():
                    event(_LOG, "kept weights are damaged", level=logging.WARNING, path=path)
                    path.unlink()
                    return None
                found[block] = load_file(path)
            except OSError:
                return None
            mark_used(path)
        return found

    def keep(self, block: int, tensors: "Mapping[str, Tensor]") -> None:
        """Write a block down, if there is room; failing costs time when it is loaded again. Blocks.

        Args:
            block: Which.
            tensors: What it consists of.
        """
        from safetensors.torch import save_file

        path = self._path(block)
        try:
            make_room(self._config, sum(tensor.nbytes for tensor in tensors.values()), ())
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent, ignore_cleanup_errors=True) as scratch:
                part = Path(scratch) / path.name
                save_file({name: tensor.cpu().clone() for name, tensor in tensors.items()}, part)  # layers share some
                with part.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                part.with_suffix(".sha256").write_text(digest)
                with contextlib.suppress(FileNotFoundError):
                    path.unlink()  # so that no reader meets a file beside the hash of another
                os.replace(part.with_suffix(".sha256"), path.with_suffix(".sha256"))
                os.replace(part, path)
        except (OSError, CapacityError) as error:
            event(_LOG, "rounded weights not kept", block=block, error=error)

    def _path(self, block: int) -> Path:
        return self._directory / f"{block}.safetensors"

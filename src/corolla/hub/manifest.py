"""What a model is: its manifest and the ModelId, which is the manifest's hash.

Knows nothing of repositories or networks; it reads the small files of a directory that it is given.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import msgspec

from corolla.hub.checkpoint import VOCABULARY_FILES, read_config
from corolla.terms import ModelId

__all__ = ["Manifest", "describe"]

_VOLATILE = frozenset({"transformers_version", "_name_or_path", "_commit_hash", "torch_dtype", "dtype"})


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a model is, apart from where it lies and what it is called.

    Args:
        config: ``config.json`` as canonical JSON, without the keys that change with whoever wrote or reads the file
            (the version of transformers, the path, the number format to compute in).
        tokenizer_sha256: The hash of the files that map text to token ids. Chat templates, the names of special tokens
            and generation defaults are left out: they only matter to the client, and their authors correct them
            without touching a weight.
        files: SHA-256 of every weight file, by name.
        revision: The commit that it came from; for people only.
    """

    config: str
    tokenizer_sha256: str
    files: Mapping[str, str]
    revision: str | None = None

    @property
    def model_id(self) -> ModelId:
        """SHA-256 over the canonical JSON of configuration, tokenizer hash and file hashes.

        The same bytes are the same model from wherever they come: neither the revision nor the name of the repository
        takes part, so a local copy and its original on the hub share a swarm.
        """
        return ModelId(_hash_json([self.config, self.tokenizer_sha256, dict(self.files)]))


def describe(directory: Path, files: Mapping[str, str], revision: str | None = None) -> Manifest:
    """Make the manifest of the model whose small files are in a directory.

    Args:
        directory: Holds ``config.json`` and the tokenizer's files.
        files: SHA-256 of every weight file, by name.
        revision: The commit that they came from, where there is one.

    Returns:
        The manifest.

    Raises:
        BadCheckpoint: If ``config.json`` is missing or malformed.
    """
    return Manifest(
        config=_to_json(_without_volatile(read_config(directory / "config.json"))),
        tokenizer_sha256=_hash_json(
            {
                name: hashlib.sha256((directory / name).read_bytes()).hexdigest()
                for name in VOCABULARY_FILES
                if (directory / name).is_file()
            }
        ),
        files=dict(files),
        revision=revision,
    )


def _without_volatile(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_volatile(inner) for key, inner in value.items() if key not in _VOLATILE}
    return value


def _to_json(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _hash_json(value: object) -> str:
    return hashlib.sha256(_to_json(value).encode()).hexdigest()

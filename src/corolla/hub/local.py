"""A model in a directory of this disk."""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from corolla.errors import BadCheckpoint, UsageError
from corolla.hub.checkpoint import INDEX_FILE, SINGLE_FILE, check_map, choose_weights, read_header, read_index
from corolla.hub.config import HubConfig
from corolla.hub.disk import hash_file
from corolla.hub.manifest import Manifest, describe
from corolla.hub.progress import Progress

__all__ = ["LocalRepository", "check_known", "open_directory", "read_map"]


class LocalRepository:
    """A directory that holds a whole model; see :class:`corolla.hub.Repository` for what it can do.

    Args:
        directory: Where it is.
        name: What the user calls it.
        manifest: What the model is.
        weight_map: Checkpoint tensor name to file name.
    """

    def __init__(self, directory: Path, name: str, manifest: Manifest, weight_map: Mapping[str, str]) -> None:
        self.name = name
        self.revision = manifest.revision
        self.manifest = manifest
        self.model_id = manifest.model_id
        self.weight_map = weight_map
        self._directory = directory

    def fetch(self, files: Iterable[str]) -> Path:
        """Return the directory itself: everything is there.

        Raises:
            UsageError: If a file is none of the model's.
        """
        check_known(files, self.manifest.files, self.name)
        return self._directory

    def metadata_directory(self) -> Path:
        """Return the directory itself."""
        return self._directory


def check_known(files: Iterable[str], known: Collection[str], name: str) -> None:
    """Check that files belong to a model.

    Args:
        files: What was asked for.
        known: What there is.
        name: The model.

    Raises:
        UsageError: If one of them does not.
    """
    unknown = sorted(set(files) - set(known))
    if unknown:
        raise UsageError(f"{name} has no weight file {unknown[0]!r}; ask for files that its weight_map names")


def read_map(directory: Path) -> dict[str, str]:
    """Read and check which file of a directory holds which tensor.

    Args:
        directory: Holds a whole model.

    Returns:
        Tensor name to file name; every file is there, sane, and holds what the map says.

    Raises:
        BadCheckpoint: If weights are missing, damaged or unsafe.
    """
    chosen = choose_weights([path.name for path in directory.iterdir()], str(directory))
    if chosen == SINGLE_FILE:
        return dict.fromkeys(sorted(read_header(directory / SINGLE_FILE)), SINGLE_FILE)
    weight_map = read_index(directory / INDEX_FILE)
    for name in sorted(set(weight_map.values())):
        check_map(directory / name, weight_map)
    return weight_map


def open_directory(directory: Path, name: str, config: HubConfig, report: Progress) -> LocalRepository:
    """Open a model that lies in a directory; its weights are hashed the first time.

    Args:
        directory: Where it is.
        name: What the user calls it.
        config: Says where hashes are remembered.
        report: Told about the hashing.

    Returns:
        The repository.

    Raises:
        BadCheckpoint: If files are missing, damaged or unsafe.
    """
    try:
        weight_map = read_map(directory)
        hashes = {file: hash_file(directory / file, config, report) for file in sorted(set(weight_map.values()))}
    except OSError as error:
        raise BadCheckpoint(f"{directory} cannot be read: {error}; check its permissions") from error
    return LocalRepository(directory, name, describe(directory, hashes), weight_map)

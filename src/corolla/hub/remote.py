"""A model on the Hugging Face hub: its listing, its small files, and the weight files that somebody asks for.

Owns every contact with the hub. What is listed once is remembered by commit, so that a known model opens offline.
"""

import hashlib
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import msgspec

from corolla.errors import BadCheckpoint, ModelError, ModelNotFound
from corolla.hub.checkpoint import (
    INDEX_FILE,
    METADATA_FILES,
    SINGLE_FILE,
    check_map,
    choose_weights,
    read_header,
    read_index,
    write_index,
)
from corolla.hub.config import HubConfig
from corolla.hub.disk import build_view, hash_file, make_room, mark_used, using_cache, write_atomically
from corolla.hub.local import check_known
from corolla.hub.manifest import Manifest, describe
from corolla.hub.progress import Progress

__all__ = ["RemoteRepository", "open_remote"]

_COMMIT = re.compile(r"[0-9a-f]{40}")
_log = logging.getLogger(__name__)


class _File(msgspec.Struct, frozen=True):
    size_bytes: int
    sha256: str | None  # None where the hub stores the file in git itself, as it does with small ones


class _Listing(msgspec.Struct, frozen=True):
    """What a repository holds at one commit: it never changes."""

    commit: str
    files: dict[str, _File]


class _Hub:
    """One repository at one revision, seen through huggingface_hub, with its errors translated.

    Args:
        repo: ``owner/name``.
        revision: A branch, a tag or a commit.
        config: Where files go, and whether to go online.
    """

    def __init__(self, repo: str, revision: str, config: HubConfig) -> None:
        self.repo = repo
        self.revision = revision
        self.config = config

    def list_files(self) -> _Listing:
        """Ask the hub what there is, or recall it where nothing can have changed or the hub is out of reach.

        Raises:
            ModelNotFound: If the hub knows no such repository or revision.
            ModelError: If access is denied, or the hub is out of reach and nothing is remembered.
        """
        memo = self.config.cache_dir / "listings" / f"{quote(f'{self.repo}@{self.revision}', safe='')}.json"
        try:
            known = msgspec.json.decode(memo.read_bytes(), type=_Listing)
        except (OSError, msgspec.DecodeError):
            known = None
        if known is not None and (self.config.offline or _COMMIT.fullmatch(self.revision)):
            return known
        if self.config.offline:
            raise ModelError(f"{self.repo}@{self.revision} was never opened here and offline is set; go online once")
        try:
            with self._translating():
                listing = self._ask()
        except ModelNotFound:
            raise
        except ModelError as error:
            if known is None:
                raise
            _log.warning("%s; going on with commit %s, seen last time", error, known.commit)
            return known
        write_atomically(memo, msgspec.json.encode(listing))
        return listing

    def _ask(self) -> _Listing:
        from huggingface_hub import HfApi

        api = HfApi(endpoint=self.config.endpoint, library_name="corolla")
        info = api.model_info(self.repo, revision=self.revision, files_metadata=True, timeout=30)
        if info.sha is None or not _COMMIT.fullmatch(info.sha):
            raise ModelError(f"the hub named no commit for {self.repo}@{self.revision}; try again later")
        return _Listing(
            commit=info.sha,
            files={
                file.rfilename: _File(file.size or 0, file.lfs.sha256 if file.lfs else None)
                for file in info.siblings or []
            },
        )

    def find(self, name: str, commit: str) -> Path | None:
        """Find a file on this disk, in our cache or in the one that other programs share.

        Args:
            name: The file.
            commit: Of which commit.

        Returns:
            Where it is, or ``None``.
        """
        from huggingface_hub import try_to_load_from_cache

        for cache in (self.config.downloads, None):
            found = try_to_load_from_cache(self.repo, name, cache_dir=cache, revision=commit)
            if isinstance(found, str):
                return Path(found)
        return None

    def download(self, name: str, commit: str) -> Path:
        """Find a file or download it, resuming what was interrupted.

        Args:
            name: The file.
            commit: Of which commit.

        Returns:
            Where it is now.

        Raises:
            ModelError: If it cannot be had.
        """
        found = self.find(name, commit)
        if found is not None:
            return found
        from huggingface_hub import hf_hub_download

        with self._translating():
            return Path(
                hf_hub_download(
                    self.repo,
                    name,
                    revision=commit,
                    cache_dir=self.config.downloads,
                    local_files_only=self.config.offline,
                    endpoint=self.config.endpoint,
                    library_name="corolla",
                )
            )

    def list_tensors(self, name: str, commit: str) -> frozenset[str]:
        """Read the names of the tensors of a weight file, without downloading the rest of it if it is not here.

        Args:
            name: The file.
            commit: Of which commit.

        Returns:
            The names.

        Raises:
            BadCheckpoint: If its header is malformed.
            ModelError: If it cannot be had.
        """
        found = self.find(name, commit)
        if found is not None:
            return read_header(found)
        if self.config.offline:
            raise ModelError(f"{name} of {self.repo} is not on this disk and offline is set; go online once")
        from huggingface_hub import HfApi
        from huggingface_hub.errors import SafetensorsParsingError

        api = HfApi(endpoint=self.config.endpoint, library_name="corolla")
        try:
            with self._translating():
                return frozenset(api.parse_safetensors_file_metadata(self.repo, name, revision=commit).tensors)
        except SafetensorsParsingError as error:
            raise BadCheckpoint(f"{name} of {self.repo} has a malformed header: {error}; tell its owner") from error

    @contextmanager
    def _translating(self) -> Iterator[None]:
        from huggingface_hub import errors

        where = f"{self.repo}@{self.revision}"
        try:
            yield
        except errors.GatedRepoError as error:
            raise ModelError(
                f"{self.repo} is gated: accept its terms at https://huggingface.co/{self.repo}, then run hf auth login"
            ) from error
        except errors.RevisionNotFoundError as error:
            raise ModelNotFound(
                f"{self.repo} has no revision {self.revision!r}; leave it out for the newest"
            ) from error
        except errors.RepositoryNotFoundError as error:
            raise ModelNotFound(
                f"the hub has no model {self.repo}, or it is private; check the name, and for a private one run "
                "hf auth login"
            ) from error
        except errors.LocalEntryNotFoundError as error:
            why = "offline is set" if self.config.offline else "the hub is out of reach"
            raise ModelError(f"a file of {where} is not on this disk and {why}; go online once") from error
        except errors.EntryNotFoundError as error:
            raise BadCheckpoint(f"the hub lists a file of {where} that it does not have: {error}") from error
        except (errors.HTTPError, OSError) as error:  # type: ignore[attr-defined]  # httpx's, under any of its names
            raise ModelError(f"{where} cannot be had now: {error}; check the network, or open a local copy") from error


class RemoteRepository:
    """A model on the hub, pinned to one commit; see :class:`corolla.hub.Repository` for what it can do.

    Args:
        hub: Where it is.
        listing: What it holds at that commit.
        manifest: What the model is.
        weight_map: Checkpoint tensor name to file name.
        report: Told about checking what was downloaded; the hub's own bars show the downloading.
    """

    def __init__(
        self, hub: _Hub, listing: _Listing, manifest: Manifest, weight_map: Mapping[str, str], report: Progress
    ) -> None:
        self.name = hub.repo
        self.revision: str | None = listing.commit
        self.manifest = manifest
        self.model_id = manifest.model_id
        self.weight_map = weight_map
        self._hub = hub
        self._listing = listing
        self._report = report

    def fetch(self, files: Iterable[str]) -> Path:
        """Download what is not here yet, check it, and link it into a directory with the metadata.

        Raises:
            UsageError: If a file is none of the model's.
            CapacityError: If there is no room for it.
            ModelError: If it cannot be had.
            BadCheckpoint: If it is not what its hash says.
        """
        wanted = sorted(set(files))
        check_known(wanted, self.manifest.files, self.name)
        with using_cache(self._hub.config):
            return self._fetch(wanted)

    def _fetch(self, wanted: list[str]) -> Path:
        commit, sizes = self._listing.commit, self._listing.files
        present = {name: path for name in wanted if (path := self._hub.find(name, commit)) is not None}
        needed_bytes = sum(sizes[name].size_bytes for name in wanted if name not in present)
        make_room(self._hub.config, needed_bytes, present.values())
        return _link_view(self._hub, self._listing, self.weight_map, {name: self._checked(name) for name in wanted})

    def metadata_directory(self) -> Path:
        """Link configuration and tokenizer into a directory without weights.

        Raises:
            CapacityError: If there is no room for them.
            ModelError: If they cannot be had.
        """
        with using_cache(self._hub.config):
            return _link_view(self._hub, self._listing, {}, {})

    def _checked(self, name: str) -> Path:
        path = self._hub.download(name, self._listing.commit)
        found = hash_file(path, self._hub.config, self._report)
        if found != self.manifest.files[name]:
            remedy = f"delete {path}"
            if path.is_relative_to(self._hub.config.downloads):  # else it belongs to other programs too
                path.resolve().unlink()
                remedy = "it was deleted, so try again"
            raise BadCheckpoint(
                f"{name} of {self.name} is damaged: its SHA-256 is {found[:12]}..., not "
                f"{self.manifest.files[name][:12]}...; {remedy}"
            )
        check_map(path, self.weight_map)
        mark_used(path.resolve())
        return path


def _link_view(hub: _Hub, listing: _Listing, weight_map: Mapping[str, str], weights: Mapping[str, Path]) -> Path:
    """Link the metadata and the given weights into a directory that transformers can load from."""
    key = hashlib.sha256(msgspec.json.encode([hub.repo, listing.commit, sorted(weights)])).hexdigest()[:32]
    view = hub.config.views / key

    def write_rest(directory: Path) -> None:
        if weights and SINGLE_FILE not in weights:  # transformers wants every file of an index to be there
            write_index(directory / INDEX_FILE, {name: file for name, file in weight_map.items() if file in weights})

    metadata = {name: hub.download(name, listing.commit) for name in METADATA_FILES if name in listing.files}
    build_view(view, {**metadata, **weights}, write_rest)
    return view


def open_remote(name: str, config: HubConfig, report: Progress) -> RemoteRepository:
    """Open a model on the hub; only its small files are downloaded.

    Args:
        name: ``owner/name`` or ``owner/name@revision``.
        config: Where files go, and whether to go online.
        report: Told about checking what is downloaded.

    Returns:
        The repository.

    Raises:
        ModelNotFound: If there is no such repository or revision.
        ModelError: If access is denied or the hub is out of reach.
        BadCheckpoint: If files are missing, damaged or unsafe.
    """
    repo, _, revision = name.partition("@")
    hub = _Hub(repo, revision or "main", config)
    listing = hub.list_files()
    chosen = choose_weights(listing.files, repo)
    if "config.json" not in listing.files:
        raise BadCheckpoint(f"{repo} has no config.json, so it is not a transformers model")
    weight_map = _read_map(hub, listing, chosen)
    missing = sorted(set(weight_map.values()) - set(listing.files))
    if missing:
        raise BadCheckpoint(f"{repo} lacks {missing[0]}, which its {INDEX_FILE} names; tell its owner")
    hashes = {file: _hash(hub, listing, file, report) for file in sorted(set(weight_map.values()))}
    manifest = describe(_link_view(hub, listing, {}, {}), hashes, listing.commit)
    return RemoteRepository(hub, listing, manifest, weight_map, report)


def _hash(hub: _Hub, listing: _Listing, file: str, report: Progress) -> str:
    return listing.files[file].sha256 or hash_file(hub.download(file, listing.commit), hub.config, report)


def _read_map(hub: _Hub, listing: _Listing, chosen: str) -> dict[str, str]:
    if chosen == INDEX_FILE:
        return read_index(hub.download(INDEX_FILE, listing.commit))
    key = quote(f"{hub.repo}@{listing.commit}", safe="")
    memo = hub.config.cache_dir / "listings" / f"{key}.index.json"
    if not memo.is_file():
        tensors = sorted(hub.list_tensors(SINGLE_FILE, listing.commit))
        write_atomically(memo, msgspec.json.encode({"weight_map": dict.fromkeys(tensors, SINGLE_FILE)}))
    return read_index(memo)

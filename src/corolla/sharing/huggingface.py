"""Adapters on the Hugging Face hub: one repository each, in PEFT's format, with the card beside its files.

Whatever comes from there is checked as if anybody had sent it.
"""

import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from huggingface_hub import CommitOperationAdd, HfApi, errors

from corolla.errors import AdapterNotFound, BadAdapter, Error, ModelError, UsageError
from corolla.hub import HubConfig
from corolla.sharing.card import CARD_FILE, MAX_CARD_BYTES, Card
from corolla.sharing.files import FILES, AdapterFiles
from corolla.sharing.shelf import Shelf
from corolla.terms import ModelId

__all__ = ["HuggingFaceStore", "is_repository"]

_NAME: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
_TAG: Final = "corolla"
_MOST_FOUND: Final = 50


def is_repository(name: str) -> bool:
    """Say whether a name could be one on the Hugging Face hub: ``owner/name``, with or without ``@revision``."""
    return _NAME.fullmatch(name.removeprefix("hf:")) is not None


class HuggingFaceStore:
    """Adapters on the Hugging Face hub; see :class:`corolla.sharing.Store` for what it can do.

    Whoever pushes must be logged in there: ``hf auth login``, or the variable ``HF_TOKEN``.

    Args:
        hub: The address of the hub, and where downloads go.
        repo: The repository to push to, ``owner/name``; ``None`` to pull and search only.
    """

    def __init__(self, hub: HubConfig, repo: str | None = None) -> None:
        if repo is not None and not _NAME.fullmatch(repo):
            raise UsageError(f"{repo!r} is no repository of the Hugging Face hub; say hf:owner/name")
        self._hub = hub
        self._repo = repo
        self._api = HfApi(endpoint=hub.endpoint)

    def push(self, files: AdapterFiles, card: Card) -> str:
        """Make the repository if need be, and put the adapter into it by one commit."""
        if self._repo is None:
            raise UsageError("say which repository to push to: hf:owner/name")
        with _translating(self._repo):
            self._api.create_repo(self._repo, repo_type="model", exist_ok=True)
            said: list[tuple[str, bytes | Path]] = [(name, files.directory / name) for name in FILES]
            said += [(CARD_FILE, card.encode()), ("README.md", _page(card).encode())]
            commit = [CommitOperationAdd(name, what) for name, what in said]
            self._api.create_commit(self._repo, commit, commit_message=f"Publish the adapter {card.label}")
        return f"hf:{self._repo}"

    def search(self, words: str, base: ModelId | None) -> list[Card]:
        """Ask the hub for repositories that say that they hold such adapters, and read the card of each."""
        found = []
        with _translating("the hub"):
            for model in self._api.list_models(filter=_TAG, search=words or None, limit=_MOST_FOUND):
                try:
                    card = self._read_card(self._look(model.id))
                except Error:
                    continue
                if base in (None, card.base):
                    found.append(card)
        return found

    def pull(self, name: str, shelf: Shelf) -> AdapterFiles:
        """Download an adapter, ``owner/name`` or ``owner/name@revision``, whose card says what it must be."""
        name = name.removeprefix("hf:") or (self._repo or "")
        if not is_repository(name):
            raise UsageError(f"{name!r} is no repository of the Hugging Face hub; say owner/name")
        found = self._look(name)
        card = self._read_card(found)
        if shelf.holds(card.id):
            return shelf.open(card.id)
        with shelf.draft(card) as draft:
            for file in FILES:
                found.check_size(file, card.files[file].size_bytes)
                shutil.copyfile(self._download(found, file), draft.directory / file)
            return draft.keep()

    def _look(self, name: str) -> "_Found":
        """See what a repository has, before anything is downloaded."""
        repo, _, revision = name.partition("@")
        if self._hub.offline:
            return _Found(repo, revision or "main", None)
        with _translating(repo):
            info = self._api.model_info(repo, revision=revision or "main", files_metadata=True, timeout=30)
        return _Found(repo, info.sha or "main", {file.rfilename: file.size or 0 for file in info.siblings or []})

    def _read_card(self, found: "_Found") -> Card:
        found.check_size(CARD_FILE, MAX_CARD_BYTES, is_limit=True)
        with self._download(found, CARD_FILE).open("rb") as file:
            return Card.read(file.read(MAX_CARD_BYTES + 1))

    def _download(self, found: "_Found", file: str) -> Path:
        with _translating(found.repo):
            path = self._api.hf_hub_download(
                found.repo,
                file,
                revision=found.revision,
                cache_dir=self._hub.downloads,
                local_files_only=self._hub.offline,
            )
        return Path(path)


@dataclass(frozen=True, slots=True)
class _Found:
    """A repository at one commit, and how large its files are; ``None`` where nobody can be asked."""

    repo: str
    revision: str
    sizes_bytes: Mapping[str, int] | None

    def check_size(self, file: str, size_bytes: int, *, is_limit: bool = False) -> None:
        """Refuse a file that is not there, or not as large as it should be."""
        if self.sizes_bytes is None:
            return
        found_bytes = self.sizes_bytes.get(file)
        if found_bytes is None:
            raise AdapterNotFound(f"{self.repo} has no {file}, so it holds no published adapter")
        if found_bytes > size_bytes or (found_bytes < size_bytes and not is_limit):
            raise BadAdapter(
                f"{file} of {self.repo} has {found_bytes} bytes, where {size_bytes} were signed or are the most that "
                "is read; it was not downloaded"
            )


def _page(card: Card) -> str:
    """Write the page that the hub shows of a repository, and by which it is found there."""
    lines = ["---", "library_name: peft", f"tags: [{_TAG}, {card.method}]"]
    if re.fullmatch(r"[\w.+-]+", card.licence):
        lines.append(f"license: {card.licence.lower()}")
    if _NAME.fullmatch(card.base_name):
        lines.append(f"base_model: {card.base_name.partition('@')[0]}")
    lines += ["---", "", f"# {card.name}", "", f"An adapter ({card.method}) of `{card.base_name}`.", ""]
    lines += [f"* {name}: {value:g}" for name, value in card.metrics.items()]
    lines += [
        "",
        card.data,
        "",
        "Use it from a swarm of Corolla:",
        "",
        f"    corolla chat --adapter {card.id[:16]}",
        "",
    ]
    return "\n".join(lines)


@contextmanager
def _translating(where: str) -> Iterator[None]:
    """Say in our words what the hub has said, or that it cannot be reached."""
    try:
        yield
    except errors.LocalEntryNotFoundError as error:
        raise AdapterNotFound(f"{where} is not on this disk, and the hub cannot be asked now: {error}") from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError) as error:
        raise AdapterNotFound(f"the Hugging Face hub has no such adapter in {where}, or you may not see it") from error
    except errors.HFValidationError as error:
        raise UsageError(f"{where} is no name on the Hugging Face hub: {error}") from error
    except (errors.HTTPError, OSError) as error:  # type: ignore[attr-defined]  # httpx's, under any of its names
        raise ModelError(f"the Hugging Face hub cannot be used for {where} now: {error}") from error

"""Adapters on the Hugging Face hub: one repository each, in PEFT's format, with the card beside its files.

Whatever comes from there is checked as if anybody had sent it.
"""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
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
                    card = self._read_card(model.id, None)
                except Error:
                    continue
                if base in (None, card.base):
                    found.append(card)
        return found

    def pull(self, name: str, shelf: Shelf) -> AdapterFiles:
        """Download an adapter, ``owner/name`` or ``owner/name@revision``, whose card says what it must be."""
        name = name.removeprefix("hf:") or (self._repo or "")
        if not _NAME.fullmatch(name):
            raise UsageError(f"{name!r} is no repository of the Hugging Face hub; say owner/name")
        repo, _, revision = name.partition("@")
        card = self._read_card(repo, revision or None)
        if shelf.holds(card.id):
            return shelf.open(card.id)
        with shelf.draft(card) as draft:
            for file in FILES:
                entry = dict(card.files)[file]
                self._check_size(repo, revision or None, file, entry.size_bytes)
                shutil.copyfile(self._download(repo, revision or None, file), draft.directory / file)
            return draft.keep()

    def _read_card(self, repo: str, revision: str | None) -> Card:
        self._check_size(repo, revision, CARD_FILE, MAX_CARD_BYTES, is_exact=False)
        return Card.read(self._download(repo, revision, CARD_FILE).read_bytes()[: MAX_CARD_BYTES + 1])

    def _check_size(
        self, repo: str, revision: str | None, file: str, size_bytes: int, *, is_exact: bool = True
    ) -> None:
        """Refuse a file before it is downloaded, if it is not as large as it should be."""
        if self._hub.offline:
            return
        with _translating(repo):
            infos = self._api.get_paths_info(repo, [file], revision=revision)
        sizes = [getattr(info, "size", None) for info in infos if info.path == file]
        if not sizes:
            raise AdapterNotFound(f"{repo} has no {file}; it holds no published adapter")
        if sizes[0] is None or sizes[0] > size_bytes or (is_exact and sizes[0] != size_bytes):
            raise BadAdapter(
                f"{file} of {repo} has {sizes[0]} bytes, where {size_bytes} are right; it was not downloaded"
            )

    def _download(self, repo: str, revision: str | None, file: str) -> Path:
        with _translating(repo):
            return Path(
                self._api.hf_hub_download(
                    repo,
                    file,
                    revision=revision,
                    cache_dir=self._hub.downloads,
                    local_files_only=self._hub.offline,
                )
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

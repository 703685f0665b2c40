"""Files on this disk: hashing them once, linking them into views, and making room for new ones.

Knows nothing of models: names, sizes and hashes only.
"""

import contextlib
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

import msgspec

from corolla.errors import CapacityError
from corolla.hub.config import HubConfig
from corolla.hub.progress import Progress

__all__ = ["build_view", "hash_file", "make_room", "mark_used", "using_cache", "write_atomically"]

_READ_BYTES = 8 << 20
_WEIGHT_BYTES = 1 << 20  # smaller files are configurations and the like: never worth deleting
_IN_USE_S = 3600.0  # a file that was fetched less than this ago may still be waiting to be loaded


class _Hash(msgspec.Struct, frozen=True):
    path: str
    size: int
    mtime_ns: int
    sha256: str


def hash_file(path: Path, config: HubConfig, report: Progress) -> str:
    """Hash a file, or recall its hash if neither its size nor its time of change differs from last time.

    Args:
        path: The file.
        config: Says where hashes are remembered.
        report: Told about every few bytes.

    Returns:
        Its SHA-256 in hexadecimal.
    """
    resolved = path.resolve()
    stat = resolved.stat()
    memo = config.cache_dir / "hashes" / f"{hashlib.sha256(str(resolved).encode()).hexdigest()[:32]}.json"
    with contextlib.suppress(OSError, msgspec.DecodeError):
        known = msgspec.json.decode(memo.read_bytes(), type=_Hash)
        if (known.path, known.size, known.mtime_ns) == (str(resolved), stat.st_size, stat.st_mtime_ns):
            return known.sha256
    digest, label, done = hashlib.sha256(), f"Hashing {path.name}", 0
    with resolved.open("rb") as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
            done += len(chunk)
            report(label, done, stat.st_size, "bytes")
    known = _Hash(str(resolved), stat.st_size, stat.st_mtime_ns, digest.hexdigest())
    with contextlib.suppress(OSError):  # forgetting it costs time only
        write_atomically(memo, msgspec.json.encode(known))
    return known.sha256


@contextlib.contextmanager
def using_cache(config: HubConfig) -> Iterator[None]:
    """Translate what the operating system says against using the cache.

    Args:
        config: Says where the cache is.

    Raises:
        CapacityError: If the cache cannot be read or written: a full disk, missing permissions.
    """
    try:
        yield
    except OSError as error:
        raise CapacityError(
            f"the cache in {config.cache_dir} cannot be used: {error}; make room, or set another cache_dir"
        ) from error


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader finds the old content or the new, never a part.

    Args:
        path: The file; missing directories are made.
        content: All of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, ignore_cleanup_errors=True) as scratch:
        part = Path(scratch) / path.name
        part.write_bytes(content)
        os.replace(part, path)


def build_view(view: Path, sources: Mapping[str, Path], write_rest: Callable[[Path], None]) -> None:
    """Make a directory of links to files that lie elsewhere, unless it is there and whole.

    Args:
        view: The directory to make.
        sources: The files to link, by the names that they get.
        write_rest: Given the unfinished directory; writes the files that have no source.
    """
    if _is_whole(view, sources):
        return
    view.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=view.parent, ignore_cleanup_errors=True) as scratch:
        unfinished = Path(scratch) / "view"
        unfinished.mkdir()
        for name, source in sources.items():
            _link(source.resolve(), unfinished / name)
        write_rest(unfinished)
        try:
            os.replace(unfinished, view)
        except OSError:
            if _is_whole(view, sources):  # another process was faster
                return
            shutil.rmtree(view)  # its links lead to files that made room for others since
            os.replace(unfinished, view)


def _is_whole(view: Path, sources: Collection[str]) -> bool:
    return view.is_dir() and all((view / name).is_file() for name in sources)


def _link(source: Path, target: Path) -> None:
    for make in (os.symlink, os.link):  # symbolic links need a privilege on Windows, hard links the same volume
        with contextlib.suppress(OSError):
            make(source, target)
            return
    shutil.copyfile(source, target)


def make_room(config: HubConfig, needed_bytes: int, keep: Collection[Path]) -> None:
    """Delete the least recently used weights until the new ones fit into what the cache may occupy.

    Weights fetched within the last hour stay, as somebody may be about to load them; loaded ones survive their file
    where the system lets a deleted file stay mapped, and stay where it does not. Two processes that fetch at the same
    time may together exceed the limit by one fetch.

    Args:
        config: Says where the cache is and what it may occupy.
        needed_bytes: What is about to be downloaded, or written.
        keep: Files that must stay.

    Raises:
        CapacityError: If there is not enough room even so.
    """
    if needed_bytes == 0:
        return
    config.downloads.mkdir(parents=True, exist_ok=True)
    if config.max_disk_bytes is not None:
        kept = {path.resolve() for path in keep}
        weights = sorted(_list_weights(config))
        excess = sum(size for _, size, _ in weights) + needed_bytes - config.max_disk_bytes
        for used_s, size, path in weights:
            if excess > 0 and path not in kept and used_s < time.time() - _IN_USE_S:
                with contextlib.suppress(OSError):
                    path.unlink()
                    excess -= size
        if excess > 0:
            raise CapacityError(
                f"{needed_bytes:,} bytes of weights do not fit: the cache in {config.cache_dir} would exceed its limit "
                f"of {config.max_disk_bytes:,} bytes by {excess:,}; raise max_disk_bytes or serve fewer blocks"
            )
    free_bytes = shutil.disk_usage(config.downloads).free
    if free_bytes < needed_bytes:
        raise CapacityError(
            f"{needed_bytes:,} bytes of weights do not fit: the disk of {config.cache_dir} has {free_bytes:,} free; "
            "make room, set another cache_dir, or serve fewer blocks"
        )


def mark_used(path: Path) -> None:
    """Note that weights were fetched now, so that others make room before them.

    Args:
        path: The file; its time of change, by which its hash is remembered, stays.
    """
    with contextlib.suppress(OSError):  # a shared cache may be read-only
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))


def _list_weights(config: HubConfig) -> list[tuple[float, int, Path]]:
    """List what may be deleted as (last use, size, path): downloaded, rounded, and, where links fail, in views."""
    found = []
    for root in (config.downloads, config.rounded, config.views):
        for path in root.rglob("*"):
            with contextlib.suppress(OSError):  # another process may be deleting too
                stat = path.lstat()
                if path.is_file() and not path.is_symlink() and stat.st_size >= _WEIGHT_BYTES:
                    found.append((stat.st_atime, stat.st_size, path.resolve()))
    return found

"""What the doctor finds out about this machine alone: packages, memory, disk, GPU, threads, the model's files.

Needs no torch, and says so where it is missing.
"""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from platformdirs import user_cache_path
from rich.filesize import decimal

import corolla
from corolla.cli.findings import Finding

__all__ = ["examine_machine", "examine_port"]

_TIGHT_BYTES = 2 << 30
_LOW_DISK_BYTES = 2 << 30
_SMALL_DISK_BYTES = 20 << 30
_EXTRAS = {"torch": "torch", "fastapi": "monitor", "zeroconf": "lan", "libtorrent": "dht", "bitsandbytes": "quantized"}


def examine_machine(model: str | None, cache: Path | None) -> list[Finding]:
    """Look at this machine.

    Args:
        model: A model whose files are wanted; ``None`` for none.
        cache: Where files are kept; ``None`` for the usual place.
    """
    cache = cache or user_cache_path("corolla", appauthor=False)
    return [
        Finding("versions", "good", f"corolla {corolla.__version__}, Python {platform.python_version()}, {_system()}"),
        _packages(),
        _memory(),
        _disk(cache),
        *_compute(),
        *([] if model is None else [_files(model, cache)]),
    ]


def examine_port(host: str, port: int) -> Finding:
    """Find out whether a server could listen where it would.

    Args:
        host: On which network interface.
        port: On which port.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as ear:
            if os.name == "posix":
                ear.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do
            ear.bind((host, port))
    except OSError as error:
        remedy = f"if that is not a server of yours, choose another: --port {port + 1 if port < 65535 else 0}"
        return Finding("port", "note", f"port {port} cannot be used: {error.strerror or error}", remedy)
    return Finding("port", "good", f"port {port} is free for a server")


def _system() -> str:
    return f"{platform.system()} {platform.release()} on {platform.machine()}"


def _packages() -> Finding:
    there = [f"{name} {version}" for name in _EXTRAS if (version := _version(name))]
    missing = [name for name in _EXTRAS if not _version(name)]
    if "torch" in missing:
        return Finding(
            "packages",
            "note",
            "torch is not installed: this machine can watch swarms and relay, but not serve or use a model",
            "pip install 'corolla[torch]'",
        )
    says = ", ".join(there)
    if missing:
        extras = ",".join(_EXTRAS[name] for name in missing)
        return Finding("packages", "good", f"{says}; without {', '.join(missing)}", f"pip install 'corolla[{extras}]'")
    return Finding("packages", "good", says)


def _version(package: str) -> str | None:
    try:
        if importlib.util.find_spec(package) is None:
            return None
        return importlib.metadata.version(package)
    except (ImportError, ValueError):
        return None


def _memory() -> Finding:
    if _version("psutil") is None:
        return Finding("memory", "unknown", "cannot be read without psutil", "pip install 'corolla[torch]'")
    import psutil

    memory = psutil.virtual_memory()
    says = f"{decimal(memory.available)} of {decimal(memory.total)} is free"
    if memory.available < _TIGHT_BYTES:
        return Finding("memory", "note", says, "close other programs, or serve few blocks: --num-blocks 1")
    return Finding("memory", "good", says)


def _disk(cache: Path) -> Finding:
    place = next(folder for folder in (cache, *cache.parents) if folder.exists())
    try:
        free = shutil.disk_usage(place).free
    except OSError as error:
        return Finding("disk", "bad", f"{place} cannot be looked at: {error.strerror}", "set cache_dir in [hub]")
    says = f"{decimal(free)} free where models are kept, {cache}"
    if not os.access(place, os.W_OK):
        return Finding("disk", "bad", f"{place} cannot be written to", "set cache_dir in [hub] of the settings")
    if free < _LOW_DISK_BYTES:
        return Finding("disk", "bad", says, "make room, or set cache_dir in [hub] to a larger disk")
    if free < _SMALL_DISK_BYTES:
        return Finding("disk", "note", says, "enough for small models; --max-disk bounds what is kept")
    return Finding("disk", "good", says)


def _compute() -> Iterator[Finding]:
    if _version("torch") is None:
        return
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            name = torch.cuda.get_device_name(index)
            yield Finding("GPU", "good", f"cuda:{index} is {name}, {decimal(free)} of {decimal(total)} free")
    elif torch.backends.mps.is_available():
        yield Finding("GPU", "note", "there is Apple's, which is used if you say --device mps", "")
    else:
        yield Finding("GPU", "note", "torch finds none, so blocks are computed by the CPU")
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    says = f"torch computes with {threads} threads on {cores} cores"
    if threads > cores:
        yield Finding("threads", "bad", says, f"too many get into each other's way: --threads {cores}")
    elif threads * 2 < cores:
        yield Finding("threads", "note", says, f"a server may use more: --threads {max(1, cores // 2)}")
    else:
        yield Finding("threads", "good", says)


def _files(model: str, cache: Path) -> Finding:
    place = Path(model).expanduser()
    if place.is_dir():
        return Finding("model", "good", f"{model} is a directory of {decimal(_size(place))}")
    kept = cache / "smollm2" if model == "smollm2" else cache / "hub" / f"models--{model.replace('/', '--')}"
    if size := _size(kept):
        return Finding("model", "good", f"{decimal(size)} of {model} are on this disk")
    return Finding("model", "note", f"nothing of {model} is on this disk; a server fetches the files of its blocks")


def _size(folder: Path) -> int:
    """Sum up the files in a folder, each once, however many links lead to it."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file():
            stat = path.stat()
            found[stat.st_dev, stat.st_ino] = stat.st_size
    return sum(found.values())

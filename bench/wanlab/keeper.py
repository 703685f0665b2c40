"""The process that builds a lab, forwards its packets, and removes it when told to or left alone by its owner."""

import contextlib
import ctypes
import gc
import hashlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from bench.wanlab.forwarder import forward
from bench.wanlab.lab import Lab
from bench.wanlab.namespaces import build_host, run_quietly, teardown

__all__ = ["keep"]

_SOURCE: Final = Path(__file__).with_name("wancore.c")


def keep(name: str, *, use_compiler: bool) -> None:
    """Build a lab, forward until standard input is readable or hung up, remove the lab.

    Args:
        name: Of a lab whose topology has been written.
        use_compiler: Whether to forward with ``wancore.c`` if there is a compiler.
    """
    try:
        lab = Lab.attach(name)
        core = _load_core() if use_compiler else None
        plan = lab.plan()
        tuns = [build_host(plan, host, lab.addr(host.name)) for host in lab.hosts]
        with contextlib.suppress(OSError):  # keep time even while all processors are busy
            os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))
        print("ready", flush=True)
        if core is None:
            gc.disable()
            forward(lab.table, tuns, seed=lab.seed, stop=0)
        else:
            _forward_with(core, lab, tuns)
    finally:
        teardown(name)


def _forward_with(core: ctypes.CDLL, lab: Lab, tuns: Sequence[int]) -> None:
    descriptors: Any = (ctypes.c_int * len(tuns))(*tuns)
    table = lab.table
    core.forward(
        len(tuns), descriptors, 0, ctypes.c_uint64(lab.seed), ctypes.byref(table.head), table.links, table.flat_routes
    )


def _load_core() -> ctypes.CDLL | None:
    """Compile ``wancore.c`` if that was not done before; ``None`` without a compiler."""
    compiler = shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    digest = hashlib.sha256(_SOURCE.read_bytes()).hexdigest()[:16]
    library = Path(tempfile.gettempdir(), f"wanlab-{os.getuid()}", f"{digest}.so")
    library.parent.mkdir(mode=0o700, exist_ok=True)
    if library.parent.stat().st_uid != os.getuid():
        return None  # somebody else's folder: do not run what is in it
    if not library.exists():
        draft = library.with_suffix(f".{os.getpid()}")
        run_quietly(compiler, "-O2", "-shared", "-fPIC", "-o", str(draft), str(_SOURCE), "-lm")
        draft.rename(library)
    return ctypes.CDLL(str(library))

"""Machine code for the few rows of a decode step, made by LLVM for the very processor that it runs on.

A decode step reads every weight once and computes little with it. In torch each block is a dozen operations, and
between two steps the weights push most of the code behind them out of the processor's caches: a call then costs more
than what it computes. Here a block is three calls (``blocks/fused.py``): from its input to queries, keys and values,
attention for each row, and from what was attended to its output. Numbers come and go in the dtype of the weights; all
between is float32.

A process of its own makes the code (``python -m corolla.machine``), since LLVM keeps 16 MiB of what it has worked on.
Knows functions, whose arguments are addresses and sizes, all of them plain integers; not tensors, blocks or sessions.
"""

import contextlib
import ctypes
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import llvmlite.binding as llvm

from corolla.machine.products import THREADING, Form
from corolla.machine.writer import Writer

__all__ = ["GROUPS", "Kernel", "chooses_among_16", "find_threads", "kernel", "make_code"]

Kernel = Callable[..., None]
"""A function of addresses and sizes."""

GROUPS: Final = {"multiply": "products", "enter": "blocks", "leave": "blocks", "attend": "blocks"}
"""What is made together, for each function: a client needs products alone."""

_CODE: Final = Path(__file__).parent / "__pycache__"
_MAKING = threading.Lock()
_MAKING_S: Final = 60.0


def kernel(dtype: str, name: str, rows: int, form: Form = "plain", threads: int = 1) -> Kernel:
    """Look up a function; the first of its group takes a second or two on a new machine, in which all are made. Blocks.

    Args:
        dtype: Of the weights and of what comes and goes: ``"float32"`` or ``"bfloat16"``.
        name: ``"multiply"``, ``"enter"``, ``"leave"`` or ``"attend"``; see :class:`corolla.machine.writer.Writer`.
        rows: One of :data:`corolla.machine.writer.ROWS`; 1 for ``"attend"``.
        form: How weights are stored; see :class:`corolla.machine.products.ProductCode`.
        threads: How many threads compute a product; more than one only after :func:`find_threads`.
    """
    with _MAKING:
        return _library(dtype, GROUPS[name], form, threads)[f"{name}_{rows}"]


@cache
def _library(dtype: str, group: str, form: Form, threads: int) -> dict[str, Kernel]:
    counts, code = _find_or_make(dtype, group, form, str(threads))
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    library: dict[str, Kernel] = {}
    for name, count in counts.items():
        prototype = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * count)  # other threads run meanwhile
        function: Any = prototype(engine.get_function_address(name))
        function.engine = engine  # which owns the code
        library[name] = function
    return library


def _find_or_make(*what: str) -> tuple[dict[str, int], bytes]:
    """Read code that was made before, or have it made and keep it: beside Python's own, which is trusted alike."""
    path = _CODE / f"{'.'.join(what)}.{_key()}.o"
    with contextlib.suppress(OSError):
        return _parsed(path.read_bytes())
    command = [sys.executable, "-m", "corolla.machine", *what]
    try:
        made = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True, timeout=_MAKING_S)
    except (OSError, subprocess.SubprocessError):  # where no process may be started
        return make_code(*what)
    with contextlib.suppress(OSError):  # where nothing may be written
        _CODE.mkdir(exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}")
        draft.write_bytes(made.stdout)
        draft.replace(path)
    return _parsed(made.stdout)


def _parsed(made: bytes) -> tuple[dict[str, int], bytes]:
    counts, _, code = made.partition(b"\n")
    return json.loads(counts), code


@cache
def _key() -> str:
    """Name all that decides what the code is: how it is written, by which LLVM, for which processor."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    processor = llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()
    digest.update(repr((version("llvmlite"), llvm.get_default_triple(), processor)).encode())
    return digest.hexdigest()[:16]


def make_code(dtype: str, group: str, form: str, threads: str) -> tuple[dict[str, int], bytes]:
    """Make the functions of a group.

    Args:
        dtype: See :func:`kernel`.
        group: One of the values of :data:`GROUPS`.
        form: See :func:`kernel`.
        threads: Likewise, as a number in words of a command line.

    Returns:
        How many arguments each function takes, and an object file for this processor.
    """
    machine = _machine()
    writer = Writer(dtype, form, threads=int(threads), registers=32 if chooses_among_16() else 16)
    counts = writer.write_products() if group == "products" else writer.write_blocks()
    writer.module.triple = llvm.get_default_triple()
    module = llvm.parse_assembly(str(writer.module))
    module.verify()
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=2))
    passes.getModulePassManager().run(module, passes)
    return counts, bytes(machine.emit_object(module))


def find_threads(libraries: Iterable[Path]) -> bool:
    """Look for what shares work among threads; say whether it is there.

    Args:
        libraries: Where it may be.
    """
    for path in libraries:
        library = ctypes.CDLL(str(path))
        if all(hasattr(library, name) for name in THREADING):
            for name in THREADING:
                llvm.add_symbol(name, ctypes.cast(getattr(library, name), ctypes.c_void_p).value)
            return True
    return False


def chooses_among_16() -> bool:
    """Say whether this processor has what ``nf4`` needs: vectors of 512 bits, of x86."""
    return bool(llvm.get_host_cpu_features().get("avx512f"))


def _machine() -> llvm.TargetMachine:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target, features = llvm.Target.from_default_triple(), llvm.get_host_cpu_features().flatten()
    return target.create_target_machine(cpu=llvm.get_host_cpu_name(), features=features, opt=3, jit=True)

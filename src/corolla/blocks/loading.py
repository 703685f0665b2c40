"""From a directory of safetensors files to the blocks of a span, reading only the tensors that belong to them.

Renaming, fusing of experts and casting are transformers' own work, done by its ``from_pretrained`` on a class whose
other blocks are stubs. Never reads a pickle and never runs code that comes with a model. Knows no servers.
"""

import json
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils import logging as transformers_logging

from corolla.blocks.architecture import BUILDING, blocks_of, check_span, load_config, model_class
from corolla.blocks.quantized import (
    COMPUTE_DTYPE,
    Quantization,
    compute_dtype,
    quantize,
    saved_bytes,
    settle_experts,
)
from corolla.blocks.selftest import FamilyReport, check_family
from corolla.blocks.shell import prune
from corolla.blocks.span import BlockSpan
from corolla.blocks.stored import packing_of, quantizer_of, settle_dtype, without_format
from corolla.errors import BadCheckpoint, UnsupportedModel
from corolla.terms import Span

__all__ = [
    "Progress",
    "block_bytes",
    "build_empty",
    "checkpoint_files",
    "derive_class",
    "load_span",
    "needed_keys",
    "open_tensors",
    "pruned_class",
    "read_model",
    "refuse_missing",
    "select_keys",
]

Progress = Callable[[int, int], None]
"""Called with how many tensors have been read, and how many there are to read; from several threads, one at a time."""

_INDEX_NAME = "model.safetensors.index.json"
_SINGLE_NAME = "model.safetensors"


def load_span(
    directory: Path,
    span: Span,
    *,
    dtype: torch.dtype | Quantization,
    device: torch.device | str = "cpu",
    report: FamilyReport | None = None,
    progress: Progress | None = None,
) -> BlockSpan:
    """Load some blocks of a model.

    Args:
        directory: ``config.json``, the checkpoint's index, and those safetensors files that hold the span's tensors.
        span: Which blocks.
        dtype: The number format to hold and compute them in; one that rounds weights computes in bfloat16.
        device: Where to put them.
        report: What the self-test of this configuration found; ``None`` to run it, for a second or less.
        progress: Told how far the reading is, and then the rounding, block by block.

    Raises:
        UsageError: If the model does not have these blocks.
        BadCheckpoint: If files or tensors are missing, damaged, or not safetensors.
        UnsupportedModel: If the architecture is unknown, its spans are not exact, or its weights are
            quantised in a way that cannot be read.
    """
    config = load_config(directory)
    check_span(config, span)
    report = report or check_family(config)
    if not report.is_supported:
        raise UnsupportedModel(f"{config.model_type} cannot be cut into spans: {report.reason}")
    cls = pruned_class(model_class(config), span)
    files = checkpoint_files(directory)
    keys = select_keys(build_empty(cls, config), files)
    with open_tensors(directory, {key: files[key] for key in keys}, progress) as tensors:
        if isinstance(dtype, torch.dtype):
            model, missing = read_model(cls, config, tensors, dtype=dtype, device=device)
        else:  # blocks go to the device one by one, since it may have no room for all before they are rounded
            model, missing = read_model(cls, config, tensors, dtype=COMPUTE_DTYPE, device="cpu")
            _quantize_all(model, span, dtype, device, progress)
    refuse_missing(missing, directory)
    return BlockSpan(model, span, is_packable=report.is_packable, is_lean=report.is_lean, dtype=compute_dtype(dtype))


def _quantize_all(
    model: PreTrainedModel,
    span: Span,
    quantization: Quantization,
    device: torch.device | str,
    progress: Progress | None,
) -> None:
    owner, name = blocks_of(model)
    for done, index in enumerate(span.indices):
        if progress is not None:
            progress(done, len(span))
        quantize(getattr(owner, name)[index].to(device).requires_grad_(False), quantization)
    model.to(torch.device(device))
    settle_experts(model)
    if progress is not None:
        progress(len(span), len(span))


def needed_keys(config: PreTrainedConfig, span: Span, index_keys: Iterable[str]) -> set[str]:
    """Which tensors of a checkpoint a span needs, so that only the files that hold them are downloaded.

    Args:
        config: The model's configuration.
        span: Which blocks.
        index_keys: The names of all tensors in the checkpoint, as its index lists them.

    Raises:
        UsageError: If the model does not have these blocks.
        UnsupportedModel: If the architecture cannot be cut into spans.
    """
    check_span(config, span)
    return select_keys(build_empty(pruned_class(model_class(config), span), config), index_keys)


def block_bytes(config: PreTrainedConfig, dtype: torch.dtype | Quantization) -> list[int]:
    """How much memory the weights of each block will take, without reading any.

    Args:
        config: The model's configuration.
        dtype: The number format to hold them in.

    Raises:
        UnsupportedModel: If the architecture cannot be cut into spans.
    """
    owner, name = blocks_of(build_empty(model_class(config), config))
    itemsize = compute_dtype(dtype).itemsize
    return [
        itemsize * sum(tensor.numel() for tensor in block.state_dict().values()) - saved_bytes(block, dtype)
        for block in getattr(owner, name)
    ]


def pruned_class(cls: type[PreTrainedModel], span: Span) -> type[PreTrainedModel]:
    """A class like ``cls`` whose instances have parameters only in the blocks of a span."""

    def __init__(self: Any, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, config, *args, **kwargs)
        prune(self, span)
        self.all_tied_weights_keys = {}

    return derive_class(cls, __init__, tie_weights=lambda self, *args, **kwargs: None)


def derive_class(
    cls: type[PreTrainedModel], init: Callable[..., None], *mixins: type, **members: Any
) -> type[PreTrainedModel]:
    """A subclass that passes for the class itself: transformers looks up conversions by a class's name and module."""
    members |= {
        "__init__": init,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    return type(cls.__name__, (*mixins, cls), members)


def build_empty(cls: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """Build a model without storage, to ask it what it consists of.

    Raises:
        UnsupportedModel: If the configuration does not make a model.
    """
    try:
        with BUILDING, torch.device("meta"):
            return cls(config)
    except (ArithmeticError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UnsupportedModel(f"transformers cannot build {cls.__name__} from this configuration: {error}") from error


def select_keys(model: PreTrainedModel, index_keys: Iterable[str]) -> set[str]:
    """Which tensors of a checkpoint end up in a model, after transformers' renaming."""
    wanted: dict[str, Any] = model.state_dict()
    packing = packing_of(model.config)
    mapping = get_model_conversion_mapping(model, hf_quantizer=quantizer_of(model.config))
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    needed = set()
    for key in sorted(index_keys):
        plain = packing.plain_name(key) if packing else key
        name, _ = rename_source_key(plain, renamings, converters, model.base_model_prefix, wanted)
        if name in wanted or key in wanted:
            needed.add(key)
    return needed


def refuse_missing(missing: Iterable[str], directory: Path) -> None:
    """Refuse a checkpoint that lacks tensors.

    Raises:
        BadCheckpoint: If any is missing.
    """
    if names := sorted(missing):
        raise BadCheckpoint(
            f"the checkpoint in {directory} lacks {len(names)} tensors of these blocks, among them {names[0]}: "
            "download it again"
        )


def checkpoint_files(directory: Path) -> dict[str, str]:
    """Which file of a checkpoint holds which tensor.

    Raises:
        BadCheckpoint: If there are no safetensors files, or their index is damaged or points outside the directory.
    """
    index, single = directory / _INDEX_NAME, directory / _SINGLE_NAME
    if not index.is_file():
        if single.is_file():
            with _open_file(single) as file:
                return dict.fromkeys(file.keys(), _SINGLE_NAME)
        pickled = sorted(path.name for path in directory.glob("*.bin"))
        hint = f"only {pickled[0]}, which is a pickle and could run code" if pickled else "nothing of the kind"
        raise BadCheckpoint(f"{directory} should hold {_SINGLE_NAME} or {_INDEX_NAME}, but there is {hint}")
    try:
        files = json.loads(index.read_bytes())["weight_map"]
        is_sound = all(_is_inside(name) for name in files.values())
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise BadCheckpoint(f"{index} is not an index of safetensors files: {error!r}") from error
    if not is_sound:
        raise BadCheckpoint(f"{index} names files that are not safetensors in its own directory: do not use this model")
    return dict(files)


@contextmanager
def open_tensors(directory: Path, files: dict[str, str], progress: Progress | None) -> Iterator[dict[str, Any]]:
    """Open tensors without reading them yet.

    Args:
        directory: Where the files are.
        files: For each tensor, the name of its file.
        progress: Told how far the reading is.

    Yields:
        For each tensor, something that reads it when it is sliced.

    Raises:
        BadCheckpoint: If a file is missing or damaged, or lacks a tensor.
    """
    count = _ReadCount(len(files), progress)
    with ExitStack() as stack:
        opened = {name: stack.enter_context(_open_file(directory / name)) for name in sorted(set(files.values()))}
        try:
            tensors = {key: _CountedSlice(opened[name].get_slice(key), count) for key, name in files.items()}
        except SafetensorError as error:
            raise BadCheckpoint(f"a file in {directory} lacks a tensor that its index promises: {error}") from error
        yield tensors


def read_model(
    cls: type[PreTrainedModel],
    config: PreTrainedConfig,
    tensors: dict[str, Any],
    *,
    dtype: torch.dtype,
    device: torch.device | str,
) -> tuple[PreTrainedModel, set[str]]:
    """Build a model from opened tensors by transformers' ``from_pretrained``.

    Returns:
        The model, and the names of its parameters for which there was no tensor.

    Raises:
        BadCheckpoint: If a tensor is damaged or does not fit the configuration.
    """
    device_map = None if torch.device(device).type == "cpu" else {"": torch.device(device)}
    is_dequantised = quantizer_of(config) is not None
    if packing := packing_of(config):
        tensors, config = packing.unpack(tensors), without_format(config)
    try:
        with BUILDING, _no_progress_bar():
            model, info = cls.from_pretrained(
                None, config=config, state_dict=tensors, dtype=dtype, device_map=device_map, output_loading_info=True
            )
    except (AttributeError, LookupError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
        raise BadCheckpoint(f"the tensors of this checkpoint do not make a {cls.__name__}: {error}") from error
    if is_dequantised:
        settle_dtype(model, dtype)
    return model, set(info["missing_keys"])


@dataclass(slots=True)
class _ReadCount:
    total: int
    progress: Progress | None
    done: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)  # transformers reads from a pool of threads

    def add(self) -> None:
        with self.lock:
            self.done += 1
            if self.progress is not None:
                self.progress(self.done, self.total)


class _CountedSlice:
    """An unread tensor of safetensors that reports when it has been read."""

    def __init__(self, unread: Any, count: _ReadCount) -> None:
        self._unread = unread
        self._count = count

    def __getitem__(self, index: Any) -> torch.Tensor:
        tensor: torch.Tensor = self._unread[index]
        self._count.add()
        return tensor

    def get_shape(self) -> list[int]:
        return list(self._unread.get_shape())

    def get_dtype(self) -> str:
        return str(self._unread.get_dtype())


def _open_file(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise BadCheckpoint(f"{path} cannot be read as safetensors ({error}): download it again") from error


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix == ".safetensors" and not path.is_absolute() and ".." not in path.parts and "\\" not in name


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()

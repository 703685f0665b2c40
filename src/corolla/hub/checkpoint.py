"""Checkpoint files that may be hostile or damaged: judged here, before any library opens them.

Owns what a model's directory must look like: safetensors only, every file named plainly, every header sane. Knows
nothing of where the files came from.
"""

import json
import struct
from collections.abc import Collection, Mapping
from pathlib import Path, PurePath

import msgspec

from corolla.errors import BadCheckpoint

__all__ = [
    "INDEX_FILE",
    "METADATA_FILES",
    "SINGLE_FILE",
    "VOCABULARY_FILES",
    "check_map",
    "choose_weights",
    "read_config",
    "read_header",
    "read_index",
    "write_index",
]

SINGLE_FILE = "model.safetensors"
"""All weights in one file."""

INDEX_FILE = "model.safetensors.index.json"
"""Which file holds which tensor, where there are several."""

VOCABULARY_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "tiktoken.model",
    "added_tokens.json",
)
"""The files that map text to token ids."""

METADATA_FILES = (
    *VOCABULARY_FILES,
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""The files besides the weights that transformers may read; never code."""

_MAX_JSON_BYTES = 100_000_000  # safetensors' own limit for a header; no honest index or config comes near it
_MAY_RUN_CODE = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})
_OTHER_WEIGHTS = frozenset({".h5", ".msgpack", ".gguf", ".onnx", ".safetensors"})


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


class _Tensor(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def choose_weights(names: Collection[str], where: str) -> str:
    """Find the file that says where the weights are, as transformers would.

    Args:
        names: The files that a directory or repository has.
        where: How to call it in an error.

    Returns:
        ``SINGLE_FILE`` or ``INDEX_FILE``.

    Raises:
        BadCheckpoint: If it has neither; the message says why what it has instead will not do.
    """
    if SINGLE_FILE in names:
        return SINGLE_FILE
    if INDEX_FILE in names:
        return INDEX_FILE
    if "adapter_config.json" in names:
        raise BadCheckpoint(f"{where} is an adapter, not a model: open the model that it was made for")
    pickled = sorted(name for name in names if PurePath(name).suffix in _MAY_RUN_CODE)
    if pickled:
        raise BadCheckpoint(
            f"{where} has its weights only as {_enumerate(pickled)}, a format that can run code when it is loaded, so "
            f"it is never read here. Convert it where you trust it: {_conversion(where)}"
        )
    other = sorted(name for name in names if PurePath(name).suffix in _OTHER_WEIGHTS)
    if other:
        raise BadCheckpoint(
            f"{where} has {_enumerate(other)} but neither {SINGLE_FILE} nor {INDEX_FILE}, from which single blocks can "
            f"be read. Open the original that it was made from, or convert it: {_conversion(where, other[0])}"
        )
    raise BadCheckpoint(f"{where} has no weights: neither {SINGLE_FILE} nor {INDEX_FILE} is there")


def _enumerate(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _conversion(where: str, name: str = "") -> str:
    """Say how to rewrite a checkpoint of a format that transformers can read; it also needs its tokenizer saved so."""
    names, options = "AutoModelForCausalLM", ""
    if name.endswith(".gguf"):
        names += ", GgufConfig"
        options = f", gguf_file='{name}', quantization_config=GgufConfig(dequantize=True)"
    load = f"AutoModelForCausalLM.from_pretrained('{where}'{options})"
    return f"python -c \"from transformers import {names}; {load}.save_pretrained('converted')\""


def read_index(path: Path) -> dict[str, str]:
    """Read which file holds which tensor.

    Args:
        path: An index file.

    Returns:
        Tensor name to file name.

    Raises:
        BadCheckpoint: If it is unreadable, empty, or names a file that is not a plain ``.safetensors`` beside it.
    """
    try:
        weight_map = msgspec.json.decode(_read_bounded(path), type=_Index).weight_map
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadCheckpoint(f"{path} is not an index of weights: {error}; download it again") from error
    if not weight_map:
        raise BadCheckpoint(f"{path} names no tensor; download it again")
    for name in set(weight_map.values()):
        plain = name.endswith(".safetensors") and not name.startswith(".") and not set(name) & set('/\\:\0*?"<>|')
        if not plain:
            raise BadCheckpoint(
                f"{path} names the file {name!r}; only .safetensors files in the same directory are accepted, as "
                "anything else may reach outside of it"
            )
    return weight_map


def write_index(path: Path, weight_map: Mapping[str, str]) -> None:
    """Write an index of the given tensors that transformers accepts.

    Args:
        path: The file to write.
        weight_map: Tensor name to file name.
    """
    path.write_bytes(msgspec.json.encode({"metadata": {}, "weight_map": dict(weight_map)}))


def read_header(path: Path) -> frozenset[str]:
    """Check the header of a safetensors file against the file's size.

    Args:
        path: A safetensors file.

    Returns:
        The names of its tensors.

    Raises:
        BadCheckpoint: If the header is missing, oversized or malformed, or promises more bytes than the file has.
    """
    try:
        size_bytes = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise BadCheckpoint(f"{path} is cut off: {size_bytes} bytes are too few; download it again")
            (header_bytes,) = struct.unpack("<Q", prefix)
            if header_bytes > min(_MAX_JSON_BYTES, size_bytes - 8):
                raise BadCheckpoint(
                    f"{path} claims a header of {header_bytes} bytes, but has {size_bytes} and may have "
                    f"{_MAX_JSON_BYTES}: it is cut off or not safetensors; download it again"
                )
            raw = file.read(header_bytes)
        entries = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
        entries.pop("__metadata__", None)
        tensors = {name: msgspec.json.decode(entry, type=_Tensor) for name, entry in entries.items()}
    except OSError as error:
        raise BadCheckpoint(f"{path} cannot be read: {error.strerror or error}; check that it is there") from error
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadCheckpoint(f"{path} has a malformed header ({error}); download it again") from error
    for name, tensor in tensors.items():
        begin, end = tensor.data_offsets
        if not 0 <= begin <= end <= size_bytes - 8 - header_bytes:
            raise BadCheckpoint(
                f"{path} is cut off or damaged: tensor {name} lies at {begin}..{end} of "
                f"{size_bytes - 8 - header_bytes} bytes of data; download it again"
            )
    return frozenset(tensors)


def check_map(path: Path, weight_map: Mapping[str, str]) -> None:
    """Check that a weight file is sane and holds every tensor that the map expects in it.

    Args:
        path: A safetensors file.
        weight_map: Tensor name to file name.

    Raises:
        BadCheckpoint: If the file is missing or damaged, or lacks a tensor.
    """
    if not path.is_file():
        raise BadCheckpoint(f"{path.parent} lacks {path.name}, which its {INDEX_FILE} names; download it again")
    missing = {tensor for tensor, file in weight_map.items() if file == path.name} - read_header(path)
    if missing:
        raise BadCheckpoint(
            f"{path} lacks {len(missing)} tensors that {INDEX_FILE} expects in it, {min(missing)} among them: the "
            "files belong to different models; download all of them again"
        )


def read_config(path: Path) -> dict[str, object]:
    """Read a model's ``config.json``.

    Args:
        path: The file.

    Returns:
        Its content.

    Raises:
        BadCheckpoint: If it is missing, malformed, names no architecture, or redirects the loading of weights.
    """
    try:
        config = json.loads(_read_bounded(path))  # not msgspec: some models' configs hold the literal Infinity
    except (ValueError, RecursionError) as error:
        raise BadCheckpoint(f"{path} is not valid JSON: {error}; download it again") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise BadCheckpoint(f"{path} names no model_type, so it is not the configuration of a transformers model")
    if "transformers_weights" in config:
        raise BadCheckpoint(
            f"{path} redirects the weights to {config['transformers_weights']!r}; remove the key transformers_weights "
            f"and name the files {SINGLE_FILE} or {INDEX_FILE}"
        )
    return config


def _read_bounded(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_JSON_BYTES + 1)
    except OSError as error:
        raise BadCheckpoint(
            f"{path} cannot be read: {error.strerror or error}; a model's directory needs {path.name}"
        ) from error
    if len(content) > _MAX_JSON_BYTES:
        raise BadCheckpoint(f"{path} has more than {_MAX_JSON_BYTES} bytes, which no honest {path.name} needs")
    return content

"""How a checkpoint stores its weights where they are not plain numbers, and how they become plain numbers.

A checkpoint that was quantised by others is read as what its numbers mean: each weight is dequantised once, when it is
loaded, and is an ordinary weight from then on. Formats that transformers dequantises by itself are left to it; those of
GPTQ and AWQ, for which it needs a package that brings a compiler, are unpacked here. Knows tensors and their names.
"""

# I inputs, O outputs, G groups of inputs

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Final

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from corolla.errors import UnsupportedModel

__all__ = ["Packing", "packing_of", "quantizer_of", "read_plainly", "settle_dtype", "without_format"]

_BY_TRANSFORMERS: Final = ("compressed-tensors", "fp8", "mxfp4")
_HERE: Final = ("awq", "gptq")
_PARTS: Final = ("qweight", "qzeros", "scales", "g_idx")
_AWQ_ORDER: Final = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where AWQ puts the eight numbers of a word (arXiv 2306.00978, its released kernels)."""


def read_plainly(config: PreTrainedConfig) -> None:
    """Have a configuration's weights read as plain numbers, whatever the checkpoint stores them as.

    Args:
        config: The configuration, which is changed.

    Raises:
        UnsupportedModel: If the format is not one of those that are read, or a package for it is missing.
    """
    owner, stored = _stored(config)
    if stored is None:
        return
    method = str(stored.get("quant_method"))
    if method in _HERE:
        packing_of(config)
        return
    if method not in _BY_TRANSFORMERS:
        raise _unreadable(method, f"read are {', '.join(sorted((*_BY_TRANSFORMERS, *_HERE)))}")
    if method == "compressed-tensors":
        _check_compressed(stored)
    owner.quantization_config = stored | {"dequantize": True}


def quantizer_of(config: PreTrainedConfig) -> Any:
    """Give what dequantises weights inside transformers; ``None`` if nothing does.

    Args:
        config: A configuration that has come through :func:`read_plainly`.

    Raises:
        UnsupportedModel: If transformers cannot make it of this configuration.
    """
    _, stored = _stored(config)
    if stored is None or stored.get("quant_method") not in _BY_TRANSFORMERS:
        return None
    try:
        quantizer = AutoHfQuantizer.from_config(stored, pre_quantized=True)
        quantizer.validate_environment()
    except (AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise _unreadable(str(stored["quant_method"]), f"its settings make no sense: {error}") from error
    return quantizer


@dataclass(frozen=True, slots=True)
class Packing:
    """How the weights of linear layers are packed, several numbers to a word of 32 bits.

    A layer's tensors are ``qweight``, ``qzeros``, ``scales`` and perhaps ``g_idx``; together they are its ``weight``.

    Args:
        is_awq: Whether words go along the outputs, in AWQ's order, or else along the inputs, as GPTQ has them.
        bits: Of a number.
        group: How many inputs share a scale.
        zero_offset: What is to be added to a stored zero point.
    """

    is_awq: bool
    bits: int
    group: int
    zero_offset: int

    def plain_name(self, key: str) -> str:
        """Say of which weight a tensor is a part."""
        layer, _, part = key.rpartition(".")
        return f"{layer}.weight" if part in _PARTS else key

    def unpack(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Give plain weights in place of their parts.

        Args:
            tensors: For each name, something that reads a tensor when it is sliced.

        Returns:
            Likewise; what is not packed is as it was.

        Raises:
            UnsupportedModel: If a part is missing.
        """
        found: dict[str, Any] = {key: tensor for key, tensor in tensors.items() if self.plain_name(key) == key}
        for key in tensors:
            layer, _, part = key.rpartition(".")
            if part == "qweight":
                parts = {name: tensors[f"{layer}.{name}"] for name in _PARTS if f"{layer}.{name}" in tensors}
                if not parts.keys() >= {"scales", "qzeros"}:
                    raise _unreadable("awq" if self.is_awq else "gptq", f"{layer} lacks its scales or zero points")
                found[f"{layer}.weight"] = _PackedWeight(self, parts)
        return found

    def dense(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Make a weight of its parts, in the number format of its scales."""
        scales_GO = parts["scales"]
        if self.is_awq:
            numbers_IO, zeros_GO = (self._unpack_awq(parts[name]) for name in ("qweight", "qzeros"))
        else:
            numbers_IO, zeros_GO = self._unpack_words(parts["qweight"].T).T, self._unpack_words(parts["qzeros"])
        inputs = len(numbers_IO)
        group_I = parts["g_idx"].long() if "g_idx" in parts else torch.arange(inputs) // (self.group or inputs)
        offsets_IO = numbers_IO - (zeros_GO + self.zero_offset)[group_I]
        weight_OI: Tensor = (offsets_IO.to(scales_GO.dtype) * scales_GO[group_I]).T.contiguous()
        return weight_OI

    def _unpack_words(self, words: Tensor) -> Tensor:
        """Take numbers out of words, the lowest bits first, along the last axis."""
        shifts = torch.arange(0, 32, self.bits, dtype=torch.int32)
        numbers = (words[..., None] >> shifts) & ((1 << self.bits) - 1)
        return numbers.flatten(-2)

    def _unpack_awq(self, words: Tensor) -> Tensor:
        numbers = self._unpack_words(words).unflatten(-1, (-1, len(_AWQ_ORDER)))
        ordered: Tensor = numbers[..., list(_AWQ_ORDER)].flatten(-2)
        return ordered


class _PackedWeight:
    """An unread weight that is unpacked when it is read, like an unread tensor of safetensors otherwise."""

    def __init__(self, packing: Packing, parts: Mapping[str, Any]) -> None:
        self._packing = packing
        self._parts = parts

    def __getitem__(self, index: Any) -> Tensor:
        weight_OI = self._packing.dense({name: part[...] for name, part in self._parts.items()})
        chosen: Tensor = weight_OI[index]
        return chosen

    def get_shape(self) -> list[int]:
        rows, columns = self._parts["qweight"].get_shape()
        words = 32 // self._packing.bits
        return [columns * words, rows] if self._packing.is_awq else [columns, rows * words]

    def get_dtype(self) -> str:
        return str(self._parts["scales"].get_dtype())


def packing_of(config: PreTrainedConfig) -> Packing | None:
    """Say how weights are packed; ``None`` if they are not, or transformers unpacks them.

    Args:
        config: The model's configuration.

    Raises:
        UnsupportedModel: If they are packed in a way that is not known.
    """
    _, stored = _stored(config)
    method = None if stored is None else stored.get("quant_method")
    if stored is None or method not in _HERE:
        return None
    is_awq, bits, group = method == "awq", stored.get("bits"), stored.get("group_size", 128)
    layout = stored.get("version", "gemm") if is_awq else stored.get("checkpoint_format", "gptq")
    layouts, widths = (("gemm",), (4,)) if is_awq else (("gptq", "gptq_v2"), (2, 4, 8))
    is_group = isinstance(group, int) and (group == -1 or group >= 1)
    if layout not in layouts or not isinstance(bits, int) or bits not in widths or not is_group:
        raise _unreadable(str(method), f"of {bits} bits in the layout {layout!r}, groups of {group}")
    return Packing(is_awq, bits, max(group, 0), 1 if layout == "gptq" else 0)


def without_format(config: PreTrainedConfig) -> PreTrainedConfig:
    """Give a copy of a configuration that says nothing of how weights are stored, for when they are plain numbers."""
    plain = copy.deepcopy(config)
    for owner in (plain, plain.get_text_config(decoder=True)):
        if hasattr(owner, "quantization_config"):
            del owner.quantization_config
    return plain


def settle_dtype(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Bring a model's weights into a number format: those that transformers has not dequantised are as they are stored.

    Args:
        model: A model that has just been read.
        dtype: The format of all weights but those that the family keeps in float32.
    """
    kept = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    for name, weight in model.named_parameters():
        if kept.isdisjoint(name.split(".")):
            weight.data = weight.data.to(dtype)


def _stored(config: PreTrainedConfig) -> tuple[PreTrainedConfig, dict[str, Any] | None]:
    """Find what a configuration says of its weights' format, and which part of it says so."""
    text = config.get_text_config(decoder=True)
    for owner in (config, text):
        found: Any = getattr(owner, "quantization_config", None)
        if found is not None:
            return owner, dict(found if isinstance(found, dict) else found.to_dict())
    return config, None


def _check_compressed(stored: Mapping[str, Any]) -> None:
    """Refuse what transformers would dequantise wrongly without a word."""
    if find_spec("compressed_tensors") is None:
        raise _unreadable(
            "compressed-tensors", "the package compressed-tensors is not installed: pip install 'corolla[quantized]'"
        )
    groups = stored.get("config_groups") or {}
    dense = [group for group in groups.values() if not any("experts" in name for name in group.get("targets", ()))]
    if len(dense) > 1:
        raise _unreadable("compressed-tensors", f"its layers are quantised in {len(dense)} different ways")
    if stored.get("transform_config") or (stored.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise _unreadable("compressed-tensors", "its weights are transformed, or sparse, besides")


def _unreadable(method: str, why: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"the weights of this checkpoint are quantised as {method}, which is not read here: {why}. Serve the model "
        "that it was made from, which --precision nf4 or int8 makes as small"
    )

"""Quantised layers: weights of eight or four bits a number, whose gradients are exact.

A quantised weight is rounded once, when it is loaded; from then on the layer *is* the rounded weight: what it gives
with gradients is, bit for bit, what a dense layer of the dequantised numbers gives, and its fast kernel agrees with
that up to rounding. Knows layers; not models, files or which precision to choose.
"""

# N rows, I inputs, O outputs

from typing import Any, Final, Literal, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from corolla.blocks.products import FrozenLayer
from corolla.errors import UnsupportedModel
from corolla.terms import Precision

__all__ = [
    "BITS",
    "COMPUTE_DTYPE",
    "Int8Layer",
    "Nf4Layer",
    "Quantization",
    "compute_dtype",
    "quantize",
    "saved_bytes",
    "weight_format",
]

Quantization = Literal["int8", "nf4"]
"""How weights are rounded: to eight bits, one scale a row; or to the four bits of QLoRA (arXiv 2305.14314, section 3),
one scale for every 64 numbers."""

BITS: Final[dict[Quantization, float]] = {"int8": 8.0, "nf4": 4.25}
"""Bits that a number of a weight takes, its share of the scales included; of int8's scales, one a row, nothing."""

COMPUTE_DTYPE: Final = torch.bfloat16
"""What blocks with quantised weights compute in."""

_INT8_ROWS: Final = 4
"""Up to so many rows torch's kernel for int8 weights is faster than making the weight dense (``bench/products.py``)."""

_GROUP: Final = 64
_KERNEL_ROWS: Final = 32  # the output rows that bitsandbytes' CPU kernel takes at once


def quantize(block: nn.Module, quantization: Quantization) -> None:
    """Round the weights of a block's linear layers, in place, one layer at a time.

    Layers that are too narrow for the format, and weights that are not in linear layers, stay as they are: norms,
    routers of a few outputs, and experts that a family keeps in one tensor.

    Args:
        block: A frozen block, best in :data:`COMPUTE_DTYPE`, which the kernels are made for.
        quantization: How to round.

    Raises:
        UnsupportedModel: If bitsandbytes is not installed and is needed.
    """
    make = Int8Layer if quantization == "int8" else Nf4Layer
    for name, layer in list(block.named_modules()):
        if _is_quantizable(layer):
            block.set_submodule(name, make(layer))


def weight_format(precision: Precision) -> torch.dtype | Quantization:
    """Give what blocks of a precision hold their weights in."""
    if precision in ("int8", "nf4"):
        return precision
    dtype: torch.dtype = getattr(torch, precision)
    return dtype


def compute_dtype(dtype: torch.dtype | Quantization) -> torch.dtype:
    """Say in which number format blocks compute whose weights are of this one."""
    return dtype if isinstance(dtype, torch.dtype) else COMPUTE_DTYPE


def saved_bytes(block: nn.Module, dtype: torch.dtype | Quantization) -> int:
    """Say how much less memory a block takes in a format than its numbers take in the format's compute dtype.

    Args:
        block: A block; its weights may be without storage.
        dtype: The format; nothing is saved in one that does not round.
    """
    if isinstance(dtype, torch.dtype):
        return 0
    numbers = sum(layer.weight.numel() for layer in block.modules() if _is_quantizable(layer))
    return int(numbers * (COMPUTE_DTYPE.itemsize - BITS[dtype] / 8))


def _is_quantizable(layer: nn.Module) -> TypeGuard[nn.Linear]:
    return type(layer) is nn.Linear and layer.in_features % _GROUP == 0 and layer.out_features >= _KERNEL_ROWS


class Int8Layer(FrozenLayer):
    """Weights of one byte, and a scale for each output: the largest number of a row becomes 127.

    Args:
        layer: The layer whose place it takes.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer)
        weight_OI = layer.weight.detach()
        scale_O = (weight_OI.float().abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny).to(weight_OI.dtype)
        rounded_OI = (weight_OI.float() / scale_O.float()[:, None]).round().clamp(-127, 127)
        self.register_buffer("weight_OI", rounded_OI.to(torch.int8))
        self.register_buffer("scale_O", scale_O)
        self.weight_OI: Tensor
        self.scale_O: Tensor

    def dense(self) -> Tensor:
        """Make the weight that this layer multiplies with."""
        return self.weight_OI.to(self.scale_O.dtype) * self.scale_O[:, None]

    def multiply(self, input_NI: Tensor) -> Tensor:
        """Multiply as fast as it can be done, without gradients."""
        if len(input_NI) > _INT8_ROWS or self.scale_O.dtype != torch.bfloat16 or self.weight_OI.device.type != "cpu":
            return linear(input_NI, self.dense(), self.bias)
        product_NO = torch._weight_int8pack_mm(input_NI, self.weight_OI, self.scale_O)
        return product_NO if self.bias is None else product_NO.add_(self.bias)


class Nf4Layer(FrozenLayer):
    """Weights of four bits: each of 64 numbers is the nearest of 16 quantiles of a normal distribution, times a scale.

    Quantising and the kernels are those of bitsandbytes. Scales are kept in bfloat16, as its kernel for CPUs takes
    them. That kernel wants the weight in an order of its own and has no gradient, so :meth:`dense` undoes the order.

    Args:
        layer: The layer whose place it takes.

    Raises:
        UnsupportedModel: If bitsandbytes is not installed.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer)
        functional, weight_OI = _bitsandbytes(), layer.weight.detach()
        packed, state = functional.quantize_4bit(weight_OI.contiguous(), blocksize=_GROUP, quant_type="nf4")
        scales = state.absmax.to(torch.bfloat16)
        self._shape = tuple(weight_OI.shape)
        self._dtype = weight_OI.dtype
        self._is_reordered = _has_cpu_kernel(weight_OI)
        if self._is_reordered:
            packed, scales = _reorder(packed, self._shape), scales.view(self._shape[0], -1).T.contiguous()
        for name, tensor in (("packed", packed), ("scales", scales), ("levels", state.code)):
            self.register_buffer(name, tensor)
        self.packed: Tensor
        self.scales: Tensor
        self.levels: Tensor

    def dense(self) -> Tensor:
        """Make the weight that this layer multiplies with."""
        packed, scales = self.packed, self.scales
        if self._is_reordered:
            packed, scales = _undo_reorder(packed, self._shape), scales.T.contiguous()
        weight_OI: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
            packed, scales.float().view(-1), _GROUP, "nf4", self._shape, self._dtype
        )
        return weight_OI

    def multiply(self, input_NI: Tensor) -> Tensor:
        """Multiply as fast as it can be done, without gradients."""
        has_kernel = self._is_reordered or (self.packed.device.type == "cuda" and len(input_NI) == 1)
        if not has_kernel:
            return linear(input_NI, self.dense(), self.bias)
        scales = self.scales if self._is_reordered else self.scales.float()
        product_NO: Tensor = torch.ops.bitsandbytes.gemv_4bit(
            input_NI, self.packed, self._shape, scales, self.levels, _GROUP
        )
        return product_NO if self.bias is None else product_NO.add_(self.bias)


def _reorder(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Bring four-bit numbers, two a byte, into the order of bitsandbytes' CPU kernel.

    In that order, 32 rows go together; of two neighbouring numbers of all 32, one byte holds a number of one of the
    first 16 rows in its low half, and the number in the same place of the last 16 in its high half.
    """
    outputs, inputs = shape
    numbers = torch.stack([packed.view(-1) >> 4, packed.view(-1) & 0xF], -1)
    rows = numbers.view(outputs // _KERNEL_ROWS, _KERNEL_ROWS, inputs // 2, 2).transpose(1, 2)
    halves = rows.reshape(outputs // _KERNEL_ROWS, inputs // 2, 2, _KERNEL_ROWS)
    return (halves[:, :, 0] | halves[:, :, 1] << 4).view(outputs, inputs // 2)


def _undo_reorder(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Undo :func:`_reorder`."""
    outputs, inputs = shape
    bytes_ = packed.view(outputs // _KERNEL_ROWS, inputs // 2, _KERNEL_ROWS)
    rows = torch.stack([bytes_ & 0xF, bytes_ >> 4], 2).view(outputs // _KERNEL_ROWS, inputs // 2, _KERNEL_ROWS, 2)
    numbers = rows.transpose(1, 2).reshape(-1, 2)
    return (numbers[:, :1] << 4) | numbers[:, 1:]


def _has_cpu_kernel(weight_OI: Tensor) -> bool:
    """Say whether bitsandbytes has its kernel for CPUs for this weight."""
    return (
        weight_OI.device.type == "cpu"
        and weight_OI.dtype == torch.bfloat16
        and weight_OI.shape[0] % _KERNEL_ROWS == 0
        and bool(_bitsandbytes().has_avx512bf16())
    )


def _bitsandbytes() -> Any:
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise UnsupportedModel(
            "four-bit weights need bitsandbytes, which is not installed: pip install 'corolla[quantized]'"
        ) from error
    return functional

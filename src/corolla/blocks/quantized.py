"""Quantised layers: weights of eight or four bits a number, whose gradients are exact.

A quantised weight is rounded once, when it is loaded; from then on the layer *is* the rounded weight: what it gives
with gradients is, bit for bit, what a dense layer of the dequantised numbers gives, and its fast kernel agrees with
that up to rounding. Knows layers; not models, files or which precision to choose.
"""

# N rows, I inputs, O outputs, E experts

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from corolla.blocks.products import FrozenLayer, Ordered, StoredWeight
from corolla.blocks.reordering import KERNEL_ROWS, reorder, undo_reorder
from corolla.errors import UnsupportedModel
from corolla.terms import Precision

__all__ = [
    "BITS",
    "COMPUTE_DTYPE",
    "Experts",
    "Int8Layer",
    "Nf4Layer",
    "Quantization",
    "Tensors",
    "compute_dtype",
    "hollow",
    "quantize",
    "saved_bytes",
    "settle_experts",
    "tensors_of",
    "weight_format",
]

Tensors = Mapping[str, Tensor]
"""Tensors of a module by their names within it."""

Quantization = Literal["int8", "nf4"]
"""How weights are rounded: to eight bits, one scale a row; or to the four bits of QLoRA (arXiv 2305.14314, section 3),
one scale for every 64 numbers."""

BITS: Final[dict[Quantization, float]] = {"int8": 8.0, "nf4": 4.25}
"""Bits that a number of a weight takes, its share of the scales included; of int8's scales, one a row, nothing."""

COMPUTE_DTYPE: Final = torch.bfloat16
"""What blocks with quantised weights compute in."""

_INT8_ROWS: Final = 16
"""Up to so many rows torch's kernel for int8 weights is faster than making the weight dense (``bench/products.py``)."""

_LINE_BYTES: Final = 64

_EXPERT_WEIGHTS: Final = ("gate_up_proj", "up_proj", "down_proj")
_GROUP: Final = 64


def quantize(block: nn.Module, quantization: Quantization, stored: Tensors | None = None) -> None:
    """Round the weights of a block's linear layers and experts, in place, one at a time.

    Layers that are too narrow for the format stay as they are, and so does what is no product: norms, routers of a few
    outputs.

    Args:
        block: A frozen block, best in :data:`COMPUTE_DTYPE`, which the kernels are made for.
        quantization: How to round.
        stored: What :func:`tensors_of` gave of it when it was rounded before; the block then has come through
            :func:`hollow`, and nothing is computed.

    Raises:
        UnsupportedModel: If bitsandbytes is not installed and is needed.
    """
    make = Int8Layer if quantization == "int8" else Nf4Layer
    for name, layer in list(block.named_modules()):
        if isinstance(layer, _Hollow) or (isinstance(layer, nn.Linear) and _is_quantizable(layer)):
            block.set_submodule(name, make(layer, None if stored is None else _part(stored, name)))
        for weight, experts in _experts_of(layer).items():
            keys = [f"{name}.{weight}.layers.{index}" for index in range(len(experts))]
            layers = [
                make(expert, None if stored is None else _part(stored, key))
                for expert, key in zip(experts, keys, strict=True)
            ]
            delattr(layer, weight)
            layer.add_module(weight, Experts(layers, is_transposed=bool(layer.is_transposed)))


def hollow(block: nn.Module) -> None:
    """Take out, in place, the weights that :func:`quantize` would round; it can then put in what it is given.

    Args:
        block: A block, whose weights may be without storage.
    """
    for name, layer in list(block.named_modules()):
        if _is_quantizable(layer):
            block.set_submodule(name, _Hollow(layer))
        for weight, layers in _experts_of(layer).items():
            experts = [_Hollow(one) for one in layers]
            delattr(layer, weight)
            setattr(layer, weight, _HollowExperts(experts))
            layer._is_hf_initialized = True  # transformers would look for what is gone


def settle_experts(model: PreTrainedModel) -> None:
    """Have transformers multiply with one expert after the other, where their weights are rounded.

    Args:
        model: A model whose blocks have come through :func:`quantize`.
    """
    if any(isinstance(part, Experts) for part in model.modules()):
        model.set_experts_implementation("eager")


def tensors_of(block: nn.Module) -> dict[str, Tensor]:
    """Give all tensors of a block that has come through :func:`quantize`, by the names that it takes them by.

    Args:
        block: The block, lean or not.
    """
    ordered = {f"{name}.weight": layer.dense() for name, layer in block.named_modules() if isinstance(layer, Ordered)}
    return {name: tensor.contiguous() for name, tensor in (block.state_dict() | ordered).items()}


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
    numbers += sum(
        layer.in_features * layer.out_features
        for part in block.modules()
        for layers in _experts_of(part).values()
        for layer in layers
    )
    return int(numbers * (COMPUTE_DTYPE.itemsize - BITS[dtype] / 8))


def _is_quantizable(layer: nn.Module) -> TypeGuard[nn.Linear]:
    return type(layer) is nn.Linear and layer.in_features % _GROUP == 0 and layer.out_features >= KERNEL_ROWS


def _experts_of(part: nn.Module) -> "dict[str, Sequence[nn.Linear | _Hollow]]":
    """Give a layer for each expert of the weights that can be rounded, if the part holds those of all experts.

    transformers keeps them in tensors ``[E, O, I]``, or ``[E, I, O]`` where ``is_transposed`` says so.
    """
    found: dict[str, Sequence[nn.Linear | _Hollow]] = {}
    for name in _EXPERT_WEIGHTS if isinstance(getattr(part, "is_transposed", None), bool) else ():
        weight = getattr(part, name, None)
        if isinstance(weight, _HollowExperts):
            found[name] = weight.experts
        elif isinstance(weight, Tensor) and weight.dim() == 3:
            weight_EOI = weight.detach().mT if part.is_transposed else weight.detach()
            layers = [_linear(weight_OI) for weight_OI in weight_EOI]
            if _is_quantizable(layers[0]):
                found[name] = layers
    return found


def _linear(weight_OI: Tensor) -> nn.Linear:
    layer = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight_OI, requires_grad=False)
    return layer


class _Hollow(nn.Module):
    """A linear layer without its weight."""

    in_features: int
    out_features: int

    def __init__(self, layer: "nn.Linear | _Hollow") -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self._is_hf_initialized = True


@dataclass(frozen=True, slots=True)
class _HollowExperts:
    experts: list[_Hollow]


def _weight(layer: nn.Linear | _Hollow) -> Tensor:
    assert isinstance(layer, nn.Linear), "a layer without its weight has no other numbers than those that were kept"
    return layer.weight.detach()


def _part(stored: Tensors, name: str) -> dict[str, Tensor]:
    prefix = f"{name}."
    return {key.removeprefix(prefix): tensor for key, tensor in stored.items() if key.startswith(prefix)}


class Experts(nn.Module):
    """The weights of experts that transformers keeps in one tensor, each rounded as a layer of its own.

    It takes the place of the tensor in transformers' own loop over experts, which multiplies with one after the other.

    Args:
        layers: A layer for each expert.
        is_transposed: Whether the tensor has the inputs before the outputs.
    """

    def __init__(self, layers: Sequence[FrozenLayer], *, is_transposed: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.is_transposed = is_transposed

    def __getitem__(self, expert: int) -> "_Expert":
        """Give what stands for the weight of one expert."""
        layer = self.layers[int(expert)]
        assert isinstance(layer, FrozenLayer)
        return _Expert(layer, self.is_transposed)


@dataclass(frozen=True, slots=True)
class _Expert:
    """Stands for a weight: a product with it is that of its layer, and all else meets the dense weight."""

    layer: FrozenLayer
    is_transposed: bool

    def dense(self) -> Tensor:
        return self.layer.dense().T if self.is_transposed else self.layer.dense()

    def float(self) -> Tensor:
        return self.dense().float()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if len(args) == 2 and not kwargs and isinstance(args[1], cls) and isinstance(args[0], Tensor):
            weight = args[1]
            if (func is linear) != weight.is_transposed and func in _PRODUCTS:
                return weight.layer(args[0])
        return func(*(arg.dense() if isinstance(arg, cls) else arg for arg in args), **(kwargs or {}))


_PRODUCTS: Final = (linear, torch.matmul, Tensor.matmul, Tensor.__matmul__)


def _aligned(tensor: Tensor) -> Tensor:
    """Move a tensor that lies across the processor's lines, as one read from a file may: torch's int8 kernel ends the
    process at an input that does not begin at a multiple of 32 bytes, or a weight at one of 16."""
    return tensor if tensor.data_ptr() % _LINE_BYTES == 0 else tensor.clone(memory_format=torch.contiguous_format)


class Int8Layer(FrozenLayer):
    """Weights of one byte, and a scale for each output: the largest number of a row becomes 127.

    Args:
        layer: The layer whose place it takes.
        stored: Its tensors, if it was rounded before.
    """

    def __init__(self, layer: nn.Linear | _Hollow, stored: Tensors | None = None) -> None:
        super().__init__(layer)
        for name, tensor in (self._round(_weight(layer)) if stored is None else stored).items():
            self._take(name, _aligned(tensor))
        self.weight_OI: Tensor
        self.scale_O: Tensor

    @staticmethod
    def _round(weight_OI: Tensor) -> dict[str, Tensor]:
        scale_O = (weight_OI.float().abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny).to(weight_OI.dtype)
        rounded_OI = (weight_OI.float() / scale_O.float()[:, None]).round().clamp(-127, 127)
        return {"weight_OI": rounded_OI.to(torch.int8).contiguous(), "scale_O": scale_O}

    def dense(self) -> Tensor:
        """Make the weight that this layer multiplies with."""
        return self.weight_OI.to(self.scale_O.dtype) * self.scale_O[:, None]

    @property
    def stored_weight(self) -> StoredWeight:
        """How its weight lies in memory."""
        return StoredWeight("int8", self.weight_OI, self.scale_O)

    def multiply(self, input_NI: Tensor) -> Tensor:
        """Multiply as fast as it can be done, without gradients."""
        if len(input_NI) > _INT8_ROWS or self.scale_O.dtype != torch.bfloat16 or self.weight_OI.device.type != "cpu":
            return linear(input_NI, self.dense(), self.bias)
        product_NO = torch._weight_int8pack_mm(_aligned(input_NI), self.weight_OI, self.scale_O)
        return product_NO if self.bias is None else product_NO.add_(self.bias)


class Nf4Layer(FrozenLayer):
    """Weights of four bits: each of 64 numbers is the nearest of 16 quantiles of a normal distribution, times a scale.

    Quantising and the kernels are those of bitsandbytes. Scales are kept in bfloat16, as its kernel for CPUs takes
    them. That kernel wants the weight in an order of its own and has no gradient, so :meth:`dense` undoes the order.

    Args:
        layer: The layer whose place it takes.
        stored: Its tensors, if it was rounded before on a machine of this kind.

    Raises:
        UnsupportedModel: If bitsandbytes is not installed.
    """

    def __init__(self, layer: nn.Linear | _Hollow, stored: Tensors | None = None) -> None:
        super().__init__(layer)
        _bitsandbytes()  # its operators are there once it is imported
        self._shape = (self.out_features, self.in_features)
        self._dtype = COMPUTE_DTYPE if stored is not None else _weight(layer).dtype
        for name, tensor in (self._round(_weight(layer)) if stored is None else stored).items():
            self._take(name, tensor)
        self.packed: Tensor
        self.scales: Tensor
        self.levels: Tensor
        self._is_reordered = self.scales.dim() == 2

    @staticmethod
    def _round(weight_OI: Tensor) -> dict[str, Tensor]:
        packed, state = _bitsandbytes().quantize_4bit(weight_OI.contiguous(), blocksize=_GROUP, quant_type="nf4")
        scales = state.absmax.to(torch.bfloat16)
        if _has_cpu_kernel(weight_OI):
            shape = (weight_OI.shape[0], weight_OI.shape[1])
            packed, scales = reorder(packed, shape), scales.view(shape[0], -1).T.contiguous()
        return {"packed": packed, "scales": scales, "levels": state.code}

    def dense(self) -> Tensor:
        """Make the weight that this layer multiplies with."""
        packed, scales = self.packed, self.scales
        if self._is_reordered:
            packed, scales = undo_reorder(packed, self._shape), scales.T.contiguous()
        weight_OI: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
            packed, scales.float().view(-1), _GROUP, "nf4", self._shape, self._dtype
        )
        return weight_OI

    @property
    def stored_weight(self) -> StoredWeight | None:
        """How its weight lies in memory; only in the order of bitsandbytes' own kernel is it read."""
        return StoredWeight("nf4", self.packed, self.scales) if self._is_reordered else None

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


def _has_cpu_kernel(weight_OI: Tensor) -> bool:
    """Say whether bitsandbytes has its kernel for CPUs for this weight."""
    return (
        weight_OI.device.type == "cpu"
        and weight_OI.dtype == torch.bfloat16
        and weight_OI.shape[0] % KERNEL_ROWS == 0
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

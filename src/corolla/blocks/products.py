"""Products of a few tokens with frozen weights, each by the kernel that is fastest for it.

A decode step multiplies one token, or one of each session, with every weight of a span; its speed is that of reading
them. torch's own products of so few rows stay far below that on a CPU (``bench/products.py``). There is
machine code of our own (``machine/kernels.py``), if llvmlite is installed; otherwise weights are brought into the order
of oneDNN, which is faster for any number of rows. Knows weights and rows; not what they are for.
"""

# N rows, I inputs, O outputs

import threading
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import psutil
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

__all__ = [
    "KERNEL_DTYPES",
    "FrozenLayer",
    "Head",
    "Ordered",
    "Product",
    "StoredWeight",
    "bias_of",
    "has_kernels",
    "order",
    "product_with",
    "stored_weight",
]

if TYPE_CHECKING:
    from corolla.machine.products import Form

Product = Callable[[Tensor], Tensor]
"""Takes ``[N, I]`` to ``[N, O]``, both in the dtype of the weight; only in inference mode."""

KERNEL_DTYPES: Final = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
"""What there is machine code for, and its name there."""

_RUNTIMES: Final[tuple[str, ...]] = ()  # ("libgomp*", "libomp*", "libiomp*") once servers beside each other are tried
_ROOMY: Final = 8
"""A head keeps a second copy of its weight where so many would fit into free memory."""
_ROWS: Final = (1, 2, 4, 6, 8, 12, 16, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256, 384, 512, 768, 1024)
"""Numbers of rows that ordered products are made for. oneDNN keeps 0.6 MB of machine code for each number of rows and
shape of weight that it has ever met, so the odd ones are rounded; 50 MB then are the most."""
_FEW_ROWS: Final = 64
"""Up to so many rows, reading the weight costs more than padding them."""
_PADDING: Final = 0.2
"""More rows get at most this share of padding, or else are divided."""

_LATELY_S: Final = 0.5
"""Threads that have asked within so long are company."""
_PATIENCE: Final = 0.5
"""How long to wait for company, as a share of what the last product took."""


class StoredWeight(NamedTuple):
    """A weight as it lies in memory, for machine code to read.

    Args:
        form: One of those that :class:`corolla.machine.products.ProductCode` reads.
        weight: Its numbers.
        scales: What they are multiplied by, if they are.
    """

    form: "Form"
    weight: Tensor
    scales: Tensor | None = None


class FrozenLayer(nn.Module):
    """A linear layer whose weight is kept in a form that is made for one kernel. A subclass for each form.

    Args:
        layer: The layer whose place it takes; it may lack its weight, if that comes by :meth:`_take`.

    Attributes:
        in_features: How many numbers it takes.
        out_features: How many it gives.
    """

    in_features: int
    out_features: int

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features  # type: ignore[assignment]
        bias_O = bias_of(layer)
        self.bias = None if bias_O is None else nn.Parameter(bias_O, requires_grad=False)

    def _take(self, name: str, tensor: Tensor) -> None:
        """Keep a tensor of the layer: its bias, or a part of its weight."""
        if name == "bias":
            self.bias = nn.Parameter(tensor, requires_grad=False)
        else:
            self.register_buffer(name, tensor)

    @property
    def unlisted_bytes(self) -> int:
        """Memory of the weight that is neither a parameter nor a buffer."""
        return 0

    @property
    def stored_weight(self) -> StoredWeight | None:
        """How its weight lies in memory; ``None`` if in a way that machine code does not read."""
        return None

    def dense(self) -> Tensor:
        """Make the weight ``[O, I]`` that this layer multiplies with, in the dtype that it computes in."""
        raise NotImplementedError

    def multiply(self, input_NI: Tensor) -> Tensor:
        """Multiply as fast as it can be done, without gradients."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        """Multiply; with gradients, which are those of the dense weight, exactly as :class:`torch.nn.Linear` does."""
        if torch.is_grad_enabled() or self.is_exact:
            return linear(input, self.dense(), self.bias)
        return self.multiply(input.reshape(-1, input.shape[-1])).view(*input.shape[:-1], -1)

    is_exact = False
    """Whether :meth:`forward` must give the very bits of the dense weight without gradients as well."""


class Ordered(FrozenLayer):
    """A layer whose weight lies in oneDNN's own order, as in what inductor makes of a linear layer.

    Args:
        layer: The layer whose place it takes; its weight is not needed any more.
    """

    is_exact = True

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer)
        self._ordered = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), 1)
        self._pointwise = torch.ops.mkldnn._linear_pointwise

    @property
    def unlisted_bytes(self) -> int:
        """Memory of the weight that is neither a parameter nor a buffer: all of it."""
        return int(self._ordered.numel() * self._ordered.element_size())

    def dense(self) -> Tensor:
        """Make the weight; its numbers are the layer's own."""
        weight_OI: Tensor = self._ordered.to_dense()
        return weight_OI

    def multiply(self, input_NI: Tensor) -> Tensor:
        """Multiply as fast as it can be done, without gradients."""
        return _in_known_rows(self._multiply, input_NI)

    def _multiply(self, input_NI: Tensor) -> Tensor:
        product_NO: Tensor = self._pointwise(input_NI, self._ordered, self.bias, "none", [], "")
        return product_NO


def _in_known_rows(product: Product, input_NI: Tensor) -> Tensor:
    """Multiply with numbers of rows that oneDNN has met before, so that its code does not grow for ever."""
    rows = len(input_NI)
    place = bisect_left(_ROWS, rows)
    padding = _ROWS[place] - rows if place < len(_ROWS) else rows
    if not padding:
        return product(input_NI)
    if rows < _FEW_ROWS or padding <= _PADDING * rows:
        return product(nn.functional.pad(input_NI, (0, 0, 0, padding)))[:rows]
    whole = _ROWS[place - 1]
    return torch.cat([product(input_NI[:whole]), _in_known_rows(product, input_NI[whole:])])


def product_with(layer: nn.Module) -> Product:
    """Choose how to multiply with the weight of a layer, and add its bias.

    Args:
        layer: A frozen linear layer, which has come through :func:`order`.
    """
    if isinstance(layer, FrozenLayer):
        return layer.multiply
    assert isinstance(layer, nn.Linear)
    weight_OI, bias_O = layer.weight.detach(), bias_of(layer)
    if _has_kernel_for(layer):
        return _kernel_product(weight_OI, bias_O)
    return lambda input_NI: linear(input_NI, weight_OI, bias_O)


def has_kernels(dtype: torch.dtype, device: torch.device) -> bool:
    """Say whether there is machine code for a dtype and the present number of threads: on a CPU, with llvmlite."""
    is_known = device.type == "cpu" and dtype in KERNEL_DTYPES and find_spec("llvmlite") is not None
    return is_known and (torch.get_num_threads() == 1 or _can_share_work())


@cache
def _can_share_work() -> bool:
    """Say whether torch's own threads can be had, from the OpenMP runtime that it brings."""
    from corolla.machine.kernels import find_threads  # llvmlite may be missing

    libraries = Path(torch.__file__).parent / "lib"
    return find_threads(path for name in _RUNTIMES for path in libraries.glob(name))


def order(layer: nn.Linear) -> nn.Module:
    """Give a layer with its weight in the order that products are fastest in; the layer itself, if that is as it is.

    Args:
        layer: A frozen layer.
    """
    if layer.weight.device.type != "cpu" or _has_kernel_for(layer) or not _orders(layer.weight.dtype):
        return layer
    return Ordered(layer)


class Head(nn.Linear):
    """An output layer that is fast for the few rows of a decode step, as long as no gradients are wanted.

    Where memory is plentiful, it keeps a second copy of its weight, in the order that is fastest.

    Args:
        layer: The layer whose weight and bias it shares, and whose place it takes. They may change.
    """

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self._product: Product | None = None
        self._made_of: tuple[int, int] | None = None
        if _has_kernel_for(layer):
            product_with(layer)  # makes the code now, and not for the first token

    def forward(self, input: Tensor) -> Tensor:
        """Multiply, as :class:`torch.nn.Linear` does."""
        weight_OI = self.weight
        if torch.is_grad_enabled() or input.dtype != weight_OI.dtype or weight_OI.is_inference():
            return super().forward(input)
        made_of = weight_OI.data_ptr(), weight_OI._version
        if self._product is None or made_of != self._made_of:
            is_roomy = psutil.virtual_memory().available > _ROOMY * weight_OI.nbytes
            self._product, self._made_of = _Together(product_with(order(self) if is_roomy else self)), made_of
        output_NO = self._product(input.reshape(-1, self.in_features))
        return output_NO.view(*input.shape[:-1], self.out_features)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the product out of copies; they make their own."""
        return {**self.__dict__, "_product": None, "_made_of": None}


@dataclass(eq=False, slots=True)
class _Asked:
    input_NI: Tensor
    output_NO: Tensor | None = None


class _Together:
    """A product that reads its weight once for all the threads that ask meanwhile, as those of several sessions do.

    Whoever asks first computes, for half of those that have asked lately, if they come in time: sessions whose steps a
    server has computed at once come here at once as well, one after the other.

    Args:
        product: The product; one thread at a time computes it.
    """

    def __init__(self, product: Product) -> None:
        self._product = product
        self._waiting: list[_Asked] = []
        self._changed = threading.Condition()
        self._is_busy = False
        self._last_asked_s: dict[int, float] = {}
        self._took_s = 0.0

    def __call__(self, input_NI: Tensor) -> Tensor:
        if len(input_NI) > _FEW_ROWS:
            return self._product(input_NI)
        asked = _Asked(input_NI)
        with self._changed:
            self._waiting.append(asked)
            self._changed.notify_all()
            expected = self._expect(time.perf_counter())
            self._changed.wait_for(lambda: asked.output_NO is not None or not self._is_busy)
            if asked.output_NO is not None:
                return asked.output_NO
            self._is_busy = True
            self._changed.wait_for(lambda: len(self._waiting) >= expected, timeout=_PATIENCE * self._took_s)
            # Whoever was busy before may have taken this one along, and failed.
            together = [asked, *(one for one in self._waiting if one is not asked)]
            self._waiting = []
        try:
            return self._multiply(together)
        finally:
            with self._changed:
                self._is_busy = False
                self._changed.notify_all()

    def _expect(self, now_s: float) -> int:
        """Half of the threads that have asked lately, this one among them."""
        self._last_asked_s[threading.get_ident()] = now_s
        self._last_asked_s = {one: at_s for one, at_s in self._last_asked_s.items() if now_s - at_s < _LATELY_S}
        return len(self._last_asked_s) // 2

    def _multiply(self, together: list[_Asked]) -> Tensor:
        """Compute for all, and return what the first has asked for."""
        started_s = time.perf_counter()
        rows = [len(asked.input_NI) for asked in together]
        with torch.inference_mode(False), torch.no_grad():  # what comes out is for threads of either mode
            output_NO = self._product(torch.cat([asked.input_NI for asked in together]))
        self._took_s = time.perf_counter() - started_s
        outputs: tuple[Tensor, ...] = output_NO.split(rows)
        for asked, output in zip(together, outputs, strict=True):
            asked.output_NO = output
        return outputs[0]


def _has_kernel_for(layer: nn.Linear) -> bool:
    weight_OI = layer.weight
    if not has_kernels(weight_OI.dtype, weight_OI.device) or not weight_OI.is_contiguous():
        return False
    from corolla.machine.vectors import LANES  # llvmlite may be missing

    return not any(width % LANES for width in weight_OI.shape)


def _kernel_product(weight_OI: Tensor, bias_O: Tensor | None) -> Product:
    from corolla.machine.kernels import kernel
    from corolla.machine.writer import ROWS

    outputs, inputs = weight_OI.shape
    codes = {
        rows: kernel(KERNEL_DTYPES[weight_OI.dtype], "multiply", rows, threads=torch.get_num_threads()) for rows in ROWS
    }

    def multiply(input_NI: Tensor) -> Tensor:
        count = len(input_NI)
        if not 0 < count <= ROWS[-1]:
            return _in_known_rows(lambda part_NI: linear(part_NI, weight_OI, bias_O), input_NI)
        rows = ROWS[bisect_left(ROWS, count)]
        input_NI = input_NI.contiguous()
        output_NO = input_NI.new_empty(count, outputs)
        scratch = torch.empty(rows * (inputs + outputs), dtype=torch.float32)
        codes[rows](
            weight_OI.data_ptr(),
            0,
            0 if bias_O is None else bias_O.data_ptr(),
            input_NI.data_ptr(),
            output_NO.data_ptr(),
            scratch.data_ptr(),
            inputs,
            outputs,
            count,
        )
        return output_NO

    return multiply


def stored_weight(layer: nn.Module) -> StoredWeight | None:
    """Say how the weight of a layer lies in memory; ``None`` if in a way that machine code does not read."""
    if isinstance(layer, FrozenLayer):
        return layer.stored_weight
    assert isinstance(layer, nn.Linear)
    return StoredWeight("plain", layer.weight.detach()) if layer.weight.is_contiguous() else None


def bias_of(layer: nn.Module) -> Tensor | None:
    """The bias of a linear layer, if it has one."""
    bias_O: Any = getattr(layer, "bias", None)
    return None if bias_O is None else bias_O.detach()


def _orders(dtype: torch.dtype) -> bool:
    operators = torch.ops.mkldnn
    has_operators = hasattr(operators, "_reorder_linear_weight") and hasattr(operators, "_linear_pointwise")
    if not torch.backends.mkldnn.is_available() or not has_operators:
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(operators._is_mkldnn_bf16_supported()))

"""Products of a few tokens with frozen weights, each by the kernel that is fastest for it.

A decode step multiplies one token, or one of each session, with every weight of a span; its speed is that of reading
them. torch's own products of so few rows stay far below that on a CPU (``bench/products.py``): so single rows in
float32 go to the BLAS of numpy, and bfloat16 to oneDNN with weights in its own order. Knows weights and rows; not what
they are for.
"""

# N rows, I inputs, O outputs

from collections.abc import Callable
from typing import Final

import numpy as np
import psutil
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.nn.functional import linear

__all__ = ["FrozenLayer", "Head", "Ordered", "Product", "order", "product_with", "use_threads"]

Product = Callable[[Tensor], Tensor]
"""Takes ``[N, I]`` to ``[N, O]``, both in the dtype of the weight; only in inference mode."""

_ROOMY: Final = 8
"""A head keeps a second copy of its weight where so many would fit into free memory."""

_GEMV_ROWS: Final = 3
"""Up to so many rows are multiplied one by one: a matrix-vector product reads the weights at the speed of memory,
which torch's product of few rows does not (``bench/products.py``)."""


def use_threads(count: int) -> None:
    """Let products use so many threads: torch's in the thread that calls this and those still to come, numpy's in all.

    Args:
        count: How many; at least one.
    """
    torch.set_num_threads(count)
    threadpool_limits(count, user_api="blas")


class FrozenLayer(nn.Module):
    """A linear layer whose weight is kept in a form that is made for one kernel. A subclass for each form.

    Args:
        bias_O: Its bias; ``None`` if it has none.
    """

    def __init__(self, bias_O: Tensor | None) -> None:
        super().__init__()
        self.bias = None if bias_O is None else nn.Parameter(bias_O.detach(), requires_grad=False)

    @property
    def nbytes(self) -> int:
        """Memory that the weight takes, without the bias."""
        raise NotImplementedError

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
        super().__init__(_bias(layer))
        self._ordered = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), 1)
        self._pointwise = torch.ops.mkldnn._linear_pointwise

    @property
    def nbytes(self) -> int:
        """Memory that the weight takes, without the bias."""
        return int(self._ordered.numel() * self._ordered.element_size())

    def dense(self) -> Tensor:
        """Make the weight; its numbers are the layer's own."""
        weight_OI: Tensor = self._ordered.to_dense()
        return weight_OI

    def multiply(self, input_NI: Tensor) -> Tensor:
        """Multiply as fast as it can be done, without gradients."""
        product_NO: Tensor = self._pointwise(input_NI, self._ordered, self.bias, "none", [], "")
        return product_NO


def product_with(layer: nn.Module) -> Product:
    """Choose how to multiply with the weight of a layer, and add its bias.

    Args:
        layer: A frozen linear layer, which has come through :func:`order`.
    """
    if isinstance(layer, FrozenLayer):
        return layer.multiply
    assert isinstance(layer, nn.Linear)
    weight_OI, bias_O = layer.weight.detach(), _bias(layer)
    if _takes_rows(weight_OI):
        return lambda input_NI: _multiply(input_NI, weight_OI, bias_O)
    return lambda input_NI: linear(input_NI, weight_OI, bias_O)


def order(layer: nn.Linear) -> nn.Module:
    """Give a layer with its weight in the order that products are fastest in; the layer itself, if that is as it is.

    Args:
        layer: A frozen layer.
    """
    weight_OI = layer.weight
    if weight_OI.device.type == "cpu" and weight_OI.dtype == torch.bfloat16 and _has_onednn():
        return Ordered(layer)
    return layer


class Head(nn.Linear):
    """An output layer that is fast for the few rows of a decode step, as long as no gradients are wanted.

    In bfloat16 it keeps a second copy of its weight, in the order that is fastest, where memory is plentiful.

    Args:
        layer: The layer whose weight and bias it shares, and whose place it takes. They may change.
    """

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self._product: Product | None = None
        self._made_of: tuple[int, int] | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Multiply, as :class:`torch.nn.Linear` does."""
        weight_OI = self.weight
        if torch.is_grad_enabled() or input.dtype != weight_OI.dtype or weight_OI.is_inference():
            return super().forward(input)
        made_of = weight_OI.data_ptr(), weight_OI._version
        if self._product is None or made_of != self._made_of:
            is_roomy = psutil.virtual_memory().available > _ROOMY * weight_OI.nbytes
            self._product, self._made_of = product_with(order(self) if is_roomy else self), made_of
        output_NO = self._product(input.reshape(-1, self.in_features))
        return output_NO.view(*input.shape[:-1], self.out_features)


def _bias(layer: nn.Linear) -> Tensor | None:
    bias_O: Tensor | None = layer.bias  # torch's own annotation forgets that there may be none
    return None if bias_O is None else bias_O.detach()


def _takes_rows(weight_OI: Tensor) -> bool:
    return weight_OI.device.type == "cpu" and weight_OI.dtype == torch.float32


def _multiply(input_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    if len(input_NI) > _GEMV_ROWS:
        return linear(input_NI, weight_OI, bias_O)
    matrix_OI = weight_OI.numpy()
    output_NO = np.empty((len(input_NI), len(matrix_OI)), np.float32)
    for row_I, output_O in zip(input_NI.numpy(), output_NO, strict=True):
        np.dot(matrix_OI, row_I, out=output_O)
    result_NO = torch.from_numpy(output_NO)
    return result_NO if bias_O is None else result_NO.add_(bias_O)


def _has_onednn() -> bool:
    operators = torch.ops.mkldnn
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(operators, "_reorder_linear_weight")
        and hasattr(operators, "_linear_pointwise")
        and bool(operators._is_mkldnn_bf16_supported())
    )

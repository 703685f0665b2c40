"""A decode step without detours, for blocks of the commonest kind: RMS norms, rotary attention, a gated MLP.

Transformers' own block is some thirty small operations around seven products; this is a dozen around the same seven,
with the kernels of ``blocks/products.py``. Only for packed rows, without gradients. A family's self-test decides
whether its blocks really are of this kind (``blocks/selftest.py``); the generic path stays the reference.
"""

# N packed tokens, D model width, H query heads, K key heads, W head width

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from corolla.blocks.adapters import Addition
from corolla.blocks.packing import Attention, PackedBatch, attend
from corolla.blocks.products import FrozenLayer, Product, order, product_with

__all__ = ["LAYERS", "LeanBlock", "Rotation"]

_NORMS = ("input_layernorm", "post_attention_layernorm")
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
LAYERS = (
    *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)


class Rotation:
    """A rotary table for the tokens of one run.

    Args:
        cos_1NW: Cosines, both halves of a head alike.
        sin_1NW: Sines, likewise.

    Attributes:
        cos_NW: The cosines.
        sin_NW: The sines.
        width: How many numbers of a head are rotated.
    """

    def __init__(self, cos_1NW: Tensor, sin_1NW: Tensor) -> None:
        self.cos_NW, self.sin_NW = cos_1NW[0].contiguous(), sin_1NW[0].contiguous()
        self.width = cos_1NW.shape[-1]
        self._signed_N1W: Tensor | None = None

    def apply(self, heads_NHW: Tensor) -> Tensor:
        """Rotate the heads of each token."""
        if self._signed_N1W is None:
            self._signed_N1W = self.sin_NW[:, None].clone()
            self._signed_N1W[..., : self.width // 2].neg_()
        return torch.addcmul(heads_NHW * self.cos_NW[:, None], heads_NHW.roll(self.width // 2, -1), self._signed_N1W)


class LeanBlock:
    """One block.

    Args:
        block: Transformers' block, of which :meth:`fits` holds. Its weights are shared; its layers may be replaced by
            others that give the same, with their weights in an order of their own.
        attention: How it attends.
    """

    def __init__(self, block: nn.Module, attention: Attention) -> None:
        for name in LAYERS:
            layer = block.get_submodule(name)
            if isinstance(layer, nn.Linear):
                block.set_submodule(name, order(layer))
        if isinstance(block.get_submodule(LAYERS[0]), FrozenLayer):
            for weight in block.parameters():  # the little that is left of a mapped file would keep all of it mapped
                weight.data = weight.data.clone()
        parts = dict(block.named_modules())
        self._attention = attention
        self._index = attention.block
        self._activate = parts["mlp.act_fn"]
        self._products = [product_with(parts[name]) for name in LAYERS]
        self._norm_attention, self._norm_mlp = (_norm(parts[name]) for name in _NORMS)
        self._norm_heads = [_norm(parts[name]) for name in _HEAD_NORMS if name in parts]
        self._head_width: int = parts["self_attn"].head_dim

    @staticmethod
    def fits(block: nn.Module) -> bool:
        """Say whether a block has the parts of this kind and no others; whether it joins them alike is to be tested."""
        parts = {
            name: part
            for name, part in block.named_modules()
            if next(part.parameters(False), None) is not None or isinstance(part, FrozenLayer)
        }
        has_all = set(parts) in ({*_NORMS, *LAYERS}, {*_NORMS, *LAYERS, *_HEAD_NORMS})
        layers = [part for name, part in parts.items() if name in LAYERS]
        modules = dict(block.named_modules())
        has_rest = "mlp.act_fn" in modules and isinstance(getattr(modules.get("self_attn"), "head_dim", None), int)
        return (
            has_all and has_rest and all(type(layer) is nn.Linear or isinstance(layer, FrozenLayer) for layer in layers)
        )

    def run(
        self, hidden_ND: Tensor, rotation: Rotation, batch: PackedBatch, addition: Addition | None = None
    ) -> Tensor:
        """Run the block over the new tokens of all rows.

        Args:
            hidden_ND: What enters it.
            rotation: Of these tokens.
            batch: Their rows.
            addition: What is added to its layers.
        """
        if addition is None:
            q, k, v, o, gate, up, down = self._products
        else:
            q, k, v, o, gate, up, down = self._added(addition)
        normed_ND = rms_norm(hidden_ND, *self._norm_attention)
        tokens, width = len(normed_ND), self._head_width
        query_NHW, key_NKW, value_NKW = (product(normed_ND).view(tokens, -1, width) for product in (q, k, v))
        if self._norm_heads:
            query_NHW = rms_norm(query_NHW, *self._norm_heads[0])
            key_NKW = rms_norm(key_NKW, *self._norm_heads[1])
        attended_NHW = attend(
            batch,
            self._attention,
            rotation.apply(query_NHW).transpose(0, 1),
            rotation.apply(key_NKW).transpose(0, 1),
            value_NKW.transpose(0, 1),
        )
        hidden_ND = o(attended_NHW.reshape(tokens, -1)).add_(hidden_ND)
        normed_ND = rms_norm(hidden_ND, *self._norm_mlp)
        inner_NI = self._activate(gate(normed_ND)).mul_(up(normed_ND))
        return down(inner_NI).add_(hidden_ND)

    def _added(self, addition: Addition) -> list[Product]:
        """Make the products that have something added to them."""
        adapted = set(addition.layers(self._index))
        return [
            partial(_add_to, product, addition, self._index, layer) if layer in adapted else product
            for layer, product in zip(LAYERS, self._products, strict=True)
        ]


def _add_to(product: Product, addition: Addition, block: int, layer: str, input_NI: Tensor) -> Tensor:
    return addition.add(block, layer, input_NI, product(input_NI))


def _norm(part: Any) -> tuple[Sequence[int], Tensor, float]:
    """What torch's RMS norm is to be told: the shape, the weight, and what keeps it from dividing by zero."""
    eps = part.variance_epsilon if hasattr(part, "variance_epsilon") else part.eps
    return part.weight.shape, part.weight.detach(), float(eps)

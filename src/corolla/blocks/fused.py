"""A decode step in three calls of machine code a block, for lean blocks on a CPU.

Knows blocks, rows and tensors; the code itself is made in ``machine/kernels.py``. For many tokens, and for those to
whose layers something is added, the lean block goes on alone.
"""

# N packed tokens, D model width, H query heads, K key heads, W head width

import struct
from array import array
from bisect import bisect_left
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from corolla.blocks.adapters import Addition
from corolla.blocks.lean import LAYERS, LeanBlock, Rotation
from corolla.blocks.packing import Attention, PackedBatch, attend, attend_pieces, seen
from corolla.blocks.products import KERNEL_DTYPES, bias_of, stored_weight

if TYPE_CHECKING:
    from corolla.machine.kernels import Kernel
    from corolla.machine.products import Form

__all__ = ["FusedBlock", "Scratch"]

_PADDING: Final = 16
"""Scores are computed so many at a time."""
_SILU: Final = ("SiLU", "SiLUActivation")
"""What torch and transformers call it."""


class Scratch:
    """Memory that the blocks of a span use in turn, and the code for them.

    Args:
        dtype: Of their hidden states, and of weights as they are.
        form: Of their weights.

    Attributes:
        rows: Numbers of rows that there is code for.
        codes: The code of ``enter`` and ``leave``, for each number of rows.
    """

    def __init__(self, dtype: torch.dtype, form: "Form") -> None:
        from corolla.machine.kernels import kernel  # only where has_kernels holds
        from corolla.machine.writer import ROWS

        name, threads = KERNEL_DTYPES[dtype], torch.get_num_threads()
        self.rows = ROWS
        self.codes: dict[str, dict[int, Kernel]] = {
            function: {rows: kernel(name, function, rows, form, threads) for rows in ROWS}
            for function in ("enter", "leave")
        }
        self._attend = kernel(name, "attend", 1, form, threads)
        self._floats = torch.zeros(0)

    def take(self, floats: int) -> int:
        """The address of so many floats; what was in them may be gone."""
        if len(self._floats) < floats:
            self._floats = torch.zeros(floats)
        return self._floats.data_ptr()

    def attend(self, scaling: float | None, mixed_HW: Tensor, output_HW: Tensor, piece: tuple[Tensor, Tensor]) -> None:
        """Store one token's key and value at the end of a piece, and let its heads attend to all of the piece.

        Args:
            scaling: What scores are multiplied by; ``None`` for one over the root of the head's width.
            mixed_HW: The token's queries, keys and values.
            output_HW: Where the output goes, for as many heads as there are queries.
            piece: Keys and values of its row.
        """
        key_KLD, value_KLD = piece
        heads, width = output_HW.shape
        key_heads, tokens, _ = key_KLD.shape
        groups, head_bytes = heads // key_heads, width * mixed_HW.itemsize
        mixed = mixed_HW.data_ptr()
        self._attend(
            mixed,
            mixed + heads * head_bytes,
            mixed + (heads + key_heads) * head_bytes,
            key_KLD.data_ptr(),
            value_KLD.data_ptr(),
            output_HW.data_ptr(),
            self.take(width + groups * (width + tokens + _PADDING)),
            tokens,
            key_heads,
            groups,
            width,
            _bits(width**-0.5 if scaling is None else scaling),
            *(key_KLD.stride()[:2]),
            *(value_KLD.stride()[:2]),
        )


class FusedBlock:
    """One block, fast for a few tokens.

    Args:
        block: Transformers' block, of which :meth:`form_of` knows the form. Its weights are shared, and may not move.
        attention: How it attends.
        scratch: Shared with the other blocks of the span.
    """

    def __init__(self, block: nn.Module, attention: Attention, scratch: Scratch) -> None:
        self._lean = LeanBlock(block, attention)
        self._attention = attention
        self._scratch = scratch
        parts = dict(block.named_modules())
        self._kept: list[Any] = []
        heads = parts["self_attn"].head_dim
        query, key, value, output, gate, up, down = (parts[name] for name in LAYERS)
        norms = [parts[name] for name in ("input_layernorm", "post_attention_layernorm")]
        head_norms = [parts.get(f"self_attn.{name}_norm") for name in ("q", "k")]
        self._width, self._attended_width = query.in_features, query.out_features
        self._widths = query.out_features, key.out_features, value.out_features
        self._inner_width, self._head_width = gate.out_features, heads
        enter = [self._width, *self._norm(norms[0]), heads, *(self._norm(norm)[0] for norm in head_norms)]
        for layer in (query, key, value):
            enter += [*self._layer(layer), layer.out_features]
        leave = [self._width, *self._norm(norms[1]), self._attended_width, self._inner_width]
        for layer in (output, gate, up, down):
            leave += self._layer(layer)
        self._enter, self._leave = array("q", enter), array("q", leave)
        self._enter_at, self._leave_at = self._enter.buffer_info()[0], self._leave.buffer_info()[0]

    @staticmethod
    def form_of(block: nn.Module) -> "Form | None":
        """Say in which form the weights of a lean block are; ``None`` if there is no code for the block.

        There is for one form, widths that are multiples of 16, and SiLU.
        """
        from corolla.machine.kernels import chooses_among_16  # only where has_kernels holds
        from corolla.machine.vectors import LANES

        parts = dict(block.named_modules())
        layers = [parts[name] for name in LAYERS]
        forms = {None if stored is None else stored.form for stored in map(stored_weight, layers)}
        widths = [parts["self_attn"].head_dim]
        widths += [width for layer in layers for width in (layer.in_features, layer.out_features)]
        eps = {_eps(part) for name, part in parts.items() if name.endswith(("layernorm", "_norm"))}
        is_even = not any(width % LANES for width in widths)
        has_rest = is_even and len(eps) == 1 and type(parts["mlp.act_fn"]).__name__ in _SILU
        if not has_rest or len(forms) > 1 or (forms == {"nf4"} and not chooses_among_16()):
            return None
        return forms.pop()

    def run(
        self, hidden_ND: Tensor, rotation: Rotation, batch: PackedBatch, addition: Addition | None = None
    ) -> Tensor:
        """Run the block over the new tokens of all rows; see :meth:`corolla.blocks.lean.LeanBlock.run`."""
        tokens, scratch = len(hidden_ND), self._scratch
        if tokens > scratch.rows[-1] or addition is not None or rotation.width != self._head_width:
            return self._lean.run(hidden_ND, rotation, batch, addition)
        rows = scratch.rows[bisect_left(scratch.rows, tokens)]
        hidden_ND = hidden_ND.contiguous()
        attended_width, width = self._attended_width, self._width
        mixed_NO = hidden_ND.new_empty(tokens, sum(self._widths))
        scratch.codes["enter"][rows](
            self._enter_at,
            hidden_ND.data_ptr(),
            rotation.cos_NW.data_ptr(),
            rotation.sin_NW.data_ptr(),
            mixed_NO.data_ptr(),
            scratch.take(rows * (width + sum(self._widths))),
            tokens,
        )
        attended_NHW = self._attend(mixed_NO.view(tokens, -1, self._head_width), batch)
        output_ND = torch.empty_like(hidden_ND)
        scratch.codes["leave"][rows](
            self._leave_at,
            attended_NHW.data_ptr(),
            hidden_ND.data_ptr(),
            output_ND.data_ptr(),
            scratch.take(rows * (attended_width + 2 * width + 2 * self._inner_width)),
            tokens,
        )
        return output_ND

    def _attend(self, mixed_NHW: Tensor, batch: PackedBatch) -> Tensor:
        heads, key_heads, _ = (wide // self._head_width for wide in self._widths)
        attention, keys = self._attention, slice(heads, heads + key_heads)
        if not attention.is_plain or any(row.count != 1 for row in batch.rows):
            parts = mixed_NHW.transpose(0, 1).split([heads, key_heads, key_heads])
            return attend(batch, attention, *parts).contiguous()
        attended_NHW = mixed_NHW.new_empty(len(mixed_NHW), heads, self._head_width)
        for index, (row, mixed_HW, output_HW) in enumerate(zip(batch.rows, mixed_NHW, attended_NHW, strict=True)):
            new_KTW = mixed_HW[keys, None], mixed_HW[keys.stop :, None]
            pieces = seen(row, attention, row.kv.make_room(attention.block, *new_KTW))
            if len(pieces) == 1:
                self._scratch.attend(attention.scaling, mixed_HW, output_HW, pieces[0])
                continue
            for part_KLW, one_KTW in zip(pieces[-1], new_KTW, strict=True):
                part_KLW[:, -1:] = one_KTW
            output_HW.copy_(attend_pieces(batch, index, attention, mixed_HW[:heads, None], pieces)[0])
        return attended_NHW

    def _norm(self, part: Any) -> tuple[int, int]:
        """The address of a norm's weight and the bits of its epsilon; zeros if there is no norm."""
        if part is None:
            return 0, 0
        return self._address(part.weight), _bits(_eps(part))

    def _layer(self, layer: nn.Module) -> tuple[int, int, int]:
        """The addresses of a layer's weight, its scales and its bias."""
        stored = stored_weight(layer)
        assert stored is not None
        return self._address(stored.weight), self._address(stored.scales), self._address(bias_of(layer))

    def _address(self, weight: Tensor | None) -> int:
        if weight is None:
            return 0
        self._kept.append(weight)  # which must live as long as its address is used
        return weight.data_ptr()


def _eps(part: Any) -> float:
    return float(part.variance_epsilon if hasattr(part, "variance_epsilon") else part.eps)


def _bits(number: float) -> int:
    return int(struct.unpack("<i", struct.pack("<f", number))[0])

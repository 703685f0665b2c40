"""Payloads of one byte a number: dynamic 8-bit quantisation by blocks. Must not know names on the wire.

After Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (arXiv 2110.02861), which the Petals paper (arXiv
2209.01188) uses between servers. A block of neighbouring numbers is divided by its largest magnitude, and each quotient
becomes the nearest of 253 levels that lie denser towards zero: ``2^(6-E)`` of them, evenly spaced, in the decade
``(10^-(E+1), 10^-E]`` of either sign for E = 0..5, and zero.

Three things differ from the paper. A decade's levels sit at the upper ends of its steps, so that 1 is one of them. The
decade E = 6 is given up for codes that mean nan and the infinities, so that these survive and spoil no other number.
Blocks never cross the end of a row, so that the bytes of a token do not depend on the tokens that it travels with.

Payload: a bfloat16 scale for each block, then a code for each number, both row-major, little-endian. Why 64 numbers to
a block, why bfloat16 scales, and what evenly spaced levels would lose: ``docs/codecs.md``.
"""

# R rows (all axes but the last), D row width, N blocks in a row, B numbers in a block

import functools
import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from corolla.codec.memory import as_tensor, narrow
from corolla.errors import CodecError
from corolla.wire import Buffer

__all__ = ["Blockwise"]

_DECADES: Final = 6
_NAN_CODE: Final = 253  # codes 0..252 are the levels in rising order
_INF_CODE: Final = 254
_MINUS_INF_CODE: Final = 255
_SCALE_DTYPE: Final = torch.bfloat16
_MIN_SCALE: Final = torch.finfo(_SCALE_DTYPE).tiny  # 2^-126, so that dividing by a scale never overflows
_MAX_SCALE: Final = torch.finfo(_SCALE_DTYPE).max


@functools.cache
def _values_by_code() -> Tensor:
    """The 256 numbers, float32, that codes stand for, before they are scaled."""
    decades = [
        (0.1 + 0.9 * torch.arange(1, 2 ** (6 - E) + 1, dtype=torch.float64, device="cpu") / 2 ** (6 - E)) * 10.0**-E
        for E in reversed(range(_DECADES))
    ]
    positive = torch.cat(decades)
    specials = torch.tensor([math.nan, math.inf, -math.inf], dtype=torch.float64, device="cpu")
    return torch.cat([-positive.flip(0), torch.zeros_like(positive[:1]), positive, specials]).float()


@functools.cache
def _codes_by_float16() -> Tensor:
    """The nearest code, uint8, for each of the 65536 float16 numbers in the order of their bits.

    Looking a code up by a float16 takes a small part of the time of a binary search among the levels for every number,
    and costs at most 2^-11 of the number in accuracy.
    """
    quotients = torch.arange(1 << 16, dtype=torch.int32, device="cpu").to(torch.uint16).view(torch.float16).double()
    levels = _values_by_code()[:_NAN_CODE].double()
    codes = torch.bucketize(quotients, (levels[1:] + levels[:-1]) / 2)
    codes[quotients.isnan()] = _NAN_CODE
    codes[quotients == math.inf] = _INF_CODE
    codes[quotients == -math.inf] = _MINUS_INF_CODE
    return codes.to(torch.uint8)


@dataclass(frozen=True)
class Blockwise:
    """Dynamic 8-bit codes and a scale for each block of a row.

    Args:
        block: How many numbers share a scale; the last block of a row may be shorter.
    """

    block: int = 64

    def packed_bytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """Say how many bytes a tensor of this shape packs into, whatever its format."""
        return math.prod(shape) + self._scale_bytes(shape)

    def row_parts(self, width: int, dtype: torch.dtype) -> tuple[tuple[int, int], ...]:
        """For each part of a payload: the bytes of one row in it, and those of one row in the parts before it."""
        scale_bytes = self._scale_bytes((1, width))
        return (scale_bytes, 0), (width, scale_bytes)

    def pack(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Turn a tensor into the parts of its payload: scales and codes."""
        blocks_RNB = self._blocks(tensor)
        scales_RN = self._scales(blocks_RNB)
        quotients_RNB = (blocks_RNB / scales_RN.float()[..., None]).to(torch.float16)
        bits = quotients_RNB.view(torch.uint16).to(torch.int32)
        codes_RD = _codes_by_float16().index_select(0, bits.flatten()).view(len(bits), -1)[:, : tensor.shape[-1]]
        return scales_RN, codes_RD.contiguous()

    def unpack(self, payload: Buffer, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Turn a payload of the right size back.

        Raises:
            CodecError: If a scale is one that :meth:`pack` never writes: negative, zero, subnormal or not finite.
        """
        width = shape[-1]
        scale_bytes = self._scale_bytes(shape)
        whole = memoryview(payload)
        scales_RN = as_tensor(whole[:scale_bytes], _SCALE_DTYPE).view(math.prod(shape[:-1]), -1).float()
        is_valid_RN = (scales_RN >= _MIN_SCALE) & (scales_RN <= _MAX_SCALE)
        if not bool(is_valid_RN.all()):
            raise CodecError(
                f"{int((~is_valid_RN).sum())} of {scales_RN.numel()} block scales are not between {_MIN_SCALE:.4g} and "
                f"{_MAX_SCALE:.4g}: the payload is damaged, or no Corolla wrote it"
            )
        values_RD = _values_by_code().index_select(0, as_tensor(whole[scale_bytes:]).to(torch.int32)).view(-1, width)
        return narrow(values_RD.mul_(self._spread(scales_RN, width)).view(shape), dtype)

    def bound(self, tensor: Tensor) -> Tensor:
        """State the largest error for each number, in float64.

        With the block's scale ``s`` (its largest finite magnitude as a bfloat16, at least 2^-126)::

            b = s (h + 2^-22) + 2^-11 |x|
            h = max(0.45 10^-E / 2^(6-E), 2.75e-6)
            E = floor(-log10(|x| / s)), at least 0 and at most 5

        ``h`` is half the distance of neighbouring levels, 2^-11 the rounding of the quotient to float16, 2^-22 covers
        subnormal quotients and float32 arithmetic. Rounding to the tensor's own format adds ``u (|x| + b) + t / 2``,
        with ``u`` and ``t`` as in :meth:`Cast.bound <corolla.codec.cast.Cast.bound>`. Before that rounding no error is
        larger than 0.8 % of the block's largest finite magnitude, or of 2^-126 if that is more. Zero for numbers
        that are not finite, since they survive.
        """
        scales_RN = self._scales(self._blocks(tensor)).double()
        scale = self._spread(scales_RN, tensor.shape[-1]).reshape(tensor.shape)
        magnitude = tensor.double().abs()
        decade = (-(magnitude / scale).log10()).floor().nan_to_num(nan=0.0).clamp(0, _DECADES - 1)
        half_gap = (0.45 * 10.0**-decade / 2.0 ** (6 - decade)).clamp_min(2.75e-6)
        error = scale * (half_gap + 2**-22) + magnitude * 2**-11
        info = torch.finfo(tensor.dtype)
        error = error + (magnitude + error) * info.eps / 2 + info.tiny * info.eps / 2
        return torch.where(magnitude.isfinite(), error, 0.0)

    def _scale_bytes(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape[:-1]) * -(-shape[-1] // self.block) * _SCALE_DTYPE.itemsize

    def _blocks(self, tensor: Tensor) -> Tensor:
        rows_RD = tensor.reshape(-1, tensor.shape[-1]).float()
        block = min(self.block, rows_RD.shape[1])
        padding = -rows_RD.shape[1] % block
        return (F.pad(rows_RD, (0, padding)) if padding else rows_RD).view(len(rows_RD), -1, block)

    def _spread(self, scales_RN: Tensor, width: int) -> Tensor:
        """Repeat each block's scale for every number of the block."""
        return scales_RN[..., None].expand(-1, -1, min(self.block, width)).flatten(1)[:, :width]

    def _scales(self, blocks_RNB: Tensor) -> Tensor:
        magnitudes_RNB = blocks_RNB.abs()
        peaks_RN = magnitudes_RNB.amax(-1)
        if not bool(peaks_RN.isfinite().all()):
            peaks_RN = magnitudes_RNB.nan_to_num(nan=0.0, posinf=0.0).amax(-1)
        return peaks_RN.clamp(_MIN_SCALE, _MAX_SCALE).to(_SCALE_DTYPE)

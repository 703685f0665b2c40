"""Products of a few rows with weights in each of the forms that servers hold them in.

Knows how weights lie in memory; not where they come from.
"""

# I inputs, N rows, O outputs

from collections.abc import Sequence
from typing import Final, Literal

from llvmlite import ir

from corolla.machine.vectors import FLOAT, INT, LANES, VectorCode, size, zeros

__all__ = ["Form", "ProductCode"]

Form = Literal["plain", "int8", "nf4"]
"""How weights are stored; see :class:`ProductCode`."""

_BYTE: Final = ir.IntType(8)
_GROUP: Final = 64
_NF4: Final = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""The levels of QLoRA (arXiv 2305.14314, appendix E)."""


class ProductCode(VectorCode):
    """Writes products.

    * ``plain``: ``[O, I]`` in the dtype of what is stored.
    * ``int8``: ``[O, I]``, a byte each, and a scale for each output.
    * ``nf4``: four bits each, and a scale for 64 inputs of an output, ``[I / 64, O]``, in the order of bitsandbytes:
      32 outputs go together; of two neighbouring inputs of all 32, one byte holds a number of one of the first 16
      outputs in its low half, and the number in the same place of the last 16 in its high half. Only for processors
      that choose among 16 floats at once.

    Args:
        dtype: Of what is stored, weights that are rounded excepted.
        form: How weights are stored.
        registers: How many vectors of 16 floats, or half as many, the processor holds.
    """

    def __init__(self, dtype: str, form: Form, *, registers: int) -> None:
        super().__init__(dtype)
        self._registers = registers
        self._form = form
        self._weight = _BYTE if form == "int8" else self.stored
        wide, integers = ir.VectorType(FLOAT, LANES), ir.VectorType(INT, LANES)
        if form == "nf4":
            self._choose = self.declare("llvm.x86.avx512.permvar.sf.512", wide, [wide, integers])

    def write_product(self, arguments: Sequence[ir.Value], rows: int) -> None:
        """Add to sums ``[N, stride]`` the products of a weight and numbers ``[N, I]``.

        Args:
            arguments: The addresses of the weight, its scales, the numbers and the sums; I, O and the stride.
            rows: N.
        """
        outputs = arguments[5]
        if self._form == "nf4":
            self._write_groups(arguments, rows)
            return
        at_once = max(1, min(4, self._registers // 2 // rows))
        whole = self.code.and_(outputs, size(-at_once))
        self._write_lines(arguments, rows, at_once, (size(0), whole))
        if at_once > 1:
            self._write_lines(arguments, rows, 1, (whole, outputs))

    def _write_lines(
        self, arguments: Sequence[ir.Value], rows: int, at_once: int, reach: tuple[ir.Value, ir.Value]
    ) -> None:
        """Go through some outputs, a few at once, and through the inputs of each."""
        weight, scales, numbers, sums, inputs, _, stride = arguments
        code = self.code
        starts = [self.after(numbers, code.mul(inputs, size(row))) for row in range(rows)]
        with self.loop(reach[1], at_once, start=reach[0]) as output:
            lines = [
                self.after(weight, code.mul(code.add(output, size(line)), inputs), self._weight)
                for line in range(at_once)
            ]
            ahead = code.mul(inputs, size(at_once))
            found = [[self.variable(zeros()) for _ in range(rows)] for _ in range(at_once)]
            with self.loop(inputs, LANES) as index:
                numbers_N = [self.load(self.after(start, index)) for start in starts]
                for line, line_found in zip(lines, found, strict=True):
                    self.prefetch(self.after(line, code.add(index, ahead), self._weight))
                    weights = self.load(self.after(line, index, self._weight), self._weight)
                    for number, one in zip(numbers_N, line_found, strict=True):
                        code.store(code.call(self.multiply_add, [weights, number, code.load(one)]), one)
            for line, line_found in enumerate(found):
                place = code.add(output, size(line))
                for row, one in enumerate(line_found):
                    total = self.sum_of(code.load(one))
                    if self._form == "int8":
                        total = code.fmul(total, self.load_one(self.after(scales, place, self.stored), self.stored))
                    address = self.after(sums, code.add(code.mul(stride, size(row)), place))
                    pointer = code.inttoptr(address, ir.PointerType(FLOAT))
                    code.store(code.fadd(total, code.load(pointer)), pointer)

    def _write_groups(self, arguments: Sequence[ir.Value], rows: int) -> None:
        """Go through 32 outputs at once, and through 64 inputs before they are scaled."""
        weight, scales, numbers, sums, inputs, outputs, stride = arguments
        code, both = self.code, 2 * LANES
        levels = ir.Constant(ir.VectorType(FLOAT, LANES), list(_NF4))
        starts = [self.after(numbers, code.mul(inputs, size(row))) for row in range(rows)]
        with self.loop(outputs, both) as output:
            packed = code.add(weight, code.lshr(code.mul(output, inputs), size(1)))
            found = [[self.variable(zeros()) for _ in range(rows)] for _ in range(2)]
            with self.loop(inputs, _GROUP) as group:
                partial = [[self.variable(zeros()) for _ in range(rows)] for _ in range(2)]
                with self.loop(code.add(group, size(_GROUP)), 2, start=group) as index:
                    address = code.add(packed, code.mul(index, size(LANES)))
                    self.prefetch(code.add(address, size(_GROUP * both)))
                    pointer = code.inttoptr(address, ir.PointerType(ir.VectorType(ir.IntType(16), LANES)))
                    numerals = code.zext(code.load(pointer, align=1), ir.VectorType(INT, LANES))
                    inputs_N = [
                        [self.after(start, code.add(index, size(place))) for start in starts] for place in (0, 1)
                    ]
                    for quarter in range(4):  # low and high half of the byte of one input, then of the next
                        shifted = code.lshr(numerals, self.ints(4 * quarter))
                        weights = code.call(self._choose, [levels, shifted])  # which sees the lowest four bits
                        for one, number in zip(partial[quarter % 2], inputs_N[quarter // 2], strict=True):
                            spread = self.spread(self.load_one(number))
                            code.store(code.call(self.multiply_add, [weights, spread, code.load(one)]), one)
                line = code.mul(code.udiv(group, size(_GROUP)), outputs)
                for half in range(2):
                    place = code.add(code.add(line, output), size(half * LANES))
                    scale = self.load(self.after(scales, place, self.stored), self.stored)
                    for part, one in zip(partial[half], found[half], strict=True):
                        code.store(code.call(self.multiply_add, [code.load(part), scale, code.load(one)]), one)
            for half in range(2):
                for row, one in enumerate(found[half]):
                    place = code.add(code.mul(stride, size(row)), code.add(output, size(half * LANES)))
                    address = self.after(sums, place)
                    self.store(code.fadd(code.load(one), self.load(address)), address)

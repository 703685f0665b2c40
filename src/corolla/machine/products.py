"""Products of a few rows with weights in each of the forms that servers hold them in.

Knows how weights lie in memory; not where they come from.
"""

# I inputs, N rows, O outputs

from collections.abc import Sequence
from typing import Final, Literal

from llvmlite import ir

from corolla.machine.vectors import FLOAT, INT, LANES, SIZE, VectorCode, size, zeros

__all__ = ["THREADING", "Form", "ProductCode"]

Form = Literal["plain", "int8", "nf4"]
"""How weights are stored; see :class:`ProductCode`."""

THREADING: Final = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
"""What hands out work, which thread one is, and of how many: they may be fewer than were asked for."""

_ARGUMENTS: Final = 7
_PIECE: Final = 32
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

    Several threads, those of torch, share the outputs of a product among themselves: GCC's OpenMP runtime, or another
    that has its functions, hands out the work.

    Args:
        dtype: Of what is stored, weights that are rounded excepted.
        form: How weights are stored.
        threads: How many threads compute.
        registers: How many vectors of 16 floats, or half as many, the processor holds.
    """

    def __init__(self, dtype: str, form: str, *, threads: int, registers: int) -> None:
        super().__init__(dtype)
        self._registers, self._threads = registers, threads
        if threads > 1:
            pointer, integer = ir.PointerType(ir.IntType(8)), ir.IntType(32)
            part = ir.PointerType(ir.FunctionType(ir.VoidType(), [pointer]))
            self._share = self.declare(THREADING[0], ir.VoidType(), [part, pointer, integer, integer])
            self._place, self._count = (self.declare(name, integer, []) for name in THREADING[1:])
        self._form = form
        self._weight = _BYTE if form == "int8" else self.stored
        wide, integers = ir.VectorType(FLOAT, LANES), ir.VectorType(INT, LANES)
        if form == "nf4":
            self._choose = self.declare("llvm.x86.avx512.permvar.sf.512", wide, [wide, integers])

    def write_product(self, rows: int) -> ir.Function:
        """Write a function that adds to sums ``[N, stride]`` the products of a weight and numbers ``[N, I]``.

        Its arguments are the addresses of the weight, its scales, the numbers and the sums; then I, O and the stride.

        Args:
            rows: N.
        """
        if self._threads == 1:
            return self.write(f"product_{rows}", _ARGUMENTS, self._write_whole, rows)
        part = self.write(f"part_{rows}", 1, self._write_part, rows)
        return self.write(f"product_{rows}", _ARGUMENTS, self._write_shared, part)

    def _write_whole(self, arguments: Sequence[ir.Value], rows: int) -> None:
        self._write_outputs(arguments, rows, (size(0), arguments[5]))

    def _write_shared(self, arguments: Sequence[ir.Value], part: ir.Function) -> None:
        """Have all threads do their parts."""
        code = self.code
        given = code.alloca(ir.ArrayType(SIZE, _ARGUMENTS))
        for place, argument in enumerate(arguments):
            code.store(argument, code.gep(given, [size(0), size(place)]))
        pointers = [
            code.bitcast(value, kind.type) for value, kind in zip((part, given), self._share.args, strict=False)
        ]
        code.call(self._share, [*pointers, ir.Constant(INT, self._threads), ir.Constant(INT, 0)])

    def _write_part(self, given: Sequence[ir.Value], rows: int) -> None:
        """Do what falls to one thread: an even share of the outputs, in pieces of 32."""
        code = self.code
        arguments = list(self.entries(given[0], [str(place) for place in range(_ARGUMENTS)]).values())
        outputs = arguments[5]
        number, count = (code.zext(code.call(function, []), SIZE) for function in (self._place, self._count))
        pieces = code.udiv(code.add(outputs, size(_PIECE - 1)), size(_PIECE))
        share = code.mul(code.udiv(code.sub(code.add(pieces, count), size(1)), count), size(_PIECE))
        reach = [code.mul(share, one) for one in (number, code.add(number, size(1)))]
        start, stop = (code.select(code.icmp_unsigned("<", one, outputs), one, outputs) for one in reach)
        self._write_outputs(arguments, rows, (start, stop))

    def _write_outputs(self, arguments: Sequence[ir.Value], rows: int, reach: tuple[ir.Value, ir.Value]) -> None:
        if self._form == "nf4":
            self._write_groups(arguments, rows, reach)
            return
        start, stop = reach
        at_once = max(1, min(4, self._registers // 2 // rows))
        whole = self.code.add(start, self.code.and_(self.code.sub(stop, start), size(-at_once)))
        self._write_lines(arguments, rows, at_once, (start, whole))
        if at_once > 1:
            self._write_lines(arguments, rows, 1, (whole, stop))

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

    def _write_groups(self, arguments: Sequence[ir.Value], rows: int, reach: tuple[ir.Value, ir.Value]) -> None:
        """Go through 32 outputs at once, and through 64 inputs before they are scaled."""
        weight, scales, numbers, sums, inputs, outputs, stride = arguments
        code, both = self.code, 2 * LANES
        levels = ir.Constant(ir.VectorType(FLOAT, LANES), list(_NF4))
        starts = [self.after(numbers, code.mul(inputs, size(row))) for row in range(rows)]
        with self.loop(reach[1], both, start=reach[0]) as output:
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

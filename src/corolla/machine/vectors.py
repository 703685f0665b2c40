"""What functions over vectors of floats are written with: loops, loads, stores and a little arithmetic, as LLVM's IR.

All addresses and counts are 64-bit integers of the code that is written; a vector is 16 floats. Knows no products,
heads or blocks.
"""

import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from llvmlite import ir

__all__ = ["FLOAT", "INT", "LANES", "SIZE", "VectorCode", "constant", "size", "zeros"]

LANES: Final = 16
"""All widths are multiples of so many."""

FLOAT, INT, SIZE = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_STORED: Final = {"float32": FLOAT, "bfloat16": ir.IntType(16)}
_BYTE: Final = ir.IntType(8)
_BYTES: Final = {str(FLOAT): 4, str(_STORED["bfloat16"]): 2, str(_BYTE): 1}
_EXP: Final = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
"""The polynomial of Cephes' expf (S. Moshier), good to two units in the last place."""
_LN2: Final = (0.693359375, -2.12194440e-4)
_LARGEST: Final = 88.0
_ROUNDING: Final = 12582912.0  # 1.5 * 2^23: what is added to it loses its fraction, and is an integer in its low bits


class VectorCode:
    """Writes functions for numbers that are stored in one dtype.

    Args:
        dtype: Of what is stored: ``"float32"`` or ``"bfloat16"``.

    Attributes:
        module: All that has been written.
        stored: How a stored number is seen.
        code: Where the function that is being written goes on.
        multiply_add: LLVM's function for the first vector times the second plus the third.
        largest: LLVM's function for the largest number of a vector.
        root: LLVM's function for a square root.
    """

    def __init__(self, dtype: str) -> None:
        self.module = ir.Module(name=f"corolla_{dtype}")
        self.stored = _STORED[dtype]
        self.code = ir.IRBuilder()
        self.multiply_add = self.declare(f"llvm.fma.v{LANES}f32", _floats(), [_floats()] * 3)
        self.largest = self.declare(f"llvm.vector.reduce.fmax.v{LANES}f32", FLOAT, [_floats()])
        self.root = self.declare("llvm.sqrt.f32", FLOAT, [FLOAT])
        self._sum = self.declare(f"llvm.vector.reduce.fadd.v{LANES}f32", FLOAT, [FLOAT, _floats()])
        pointer = ir.PointerType(ir.IntType(8))
        self._fetch = self.declare("llvm.prefetch.p0", ir.VoidType(), [pointer, INT, INT, INT])

    def declare(self, name: str, returned: ir.Type, arguments: Sequence[ir.Type]) -> ir.Value:
        """Name a function of LLVM's, or one that is to be written."""
        return ir.Function(self.module, ir.FunctionType(returned, arguments), name=name)

    def write(
        self, name: str, count: int, write: Callable[..., None], *further: Any, is_public: bool = False
    ) -> ir.Value:
        """Write a function of so many integers; ``write`` is given these, and what goes further to it."""
        function = self.declare(name, ir.VoidType(), [SIZE] * count)
        function.linkage = "external" if is_public else "internal"
        self.code = ir.IRBuilder(function.append_basic_block("entry"))
        write(function.args, *further)
        self.code.ret_void()
        return function

    @contextmanager
    def loop(self, stop: ir.Value, step: int = 1, start: ir.Value | None = None) -> Iterator[ir.Value]:
        """Count; yields the index."""
        code, start = self.code, size(0) if start is None else start
        before = code.block
        head, body, after = (code.append_basic_block(name) for name in ("head", "body", "after"))
        code.branch(head)
        code.position_at_end(head)
        index = code.phi(SIZE)
        index.add_incoming(start, before)
        code.cbranch(code.icmp_signed("<", index, stop), body, after)
        code.position_at_end(body)
        yield index
        index.add_incoming(code.add(index, size(step)), code.block)
        code.branch(head)
        code.position_at_end(after)

    def variable(self, value: ir.Value) -> ir.Value:
        """Make a place for what changes in a loop; LLVM finds a register for it."""
        with self.code.goto_entry_block():
            place = self.code.alloca(value.type)
        self.code.store(value, place)
        return place

    def entries(self, table: ir.Value, names: Sequence[str]) -> dict[str, ir.Value]:
        """Read integers that lie one after the other, by their names."""
        pointer = self.code.inttoptr(table, ir.PointerType(SIZE))
        return {name: self.code.load(self.code.gep(pointer, [size(place)])) for place, name in enumerate(names)}

    def after(self, address: ir.Value, count: ir.Value, kind: ir.Type = FLOAT) -> ir.Value:
        """The address of what comes so many numbers later."""
        return self.code.add(address, self.code.mul(count, size(_BYTES[str(kind)])))

    def load(self, address: ir.Value, kind: ir.Type = FLOAT, lanes: int = LANES) -> ir.Value:
        """Read numbers as floats."""
        code = self.code
        pointer = code.inttoptr(address, ir.PointerType(ir.VectorType(kind, lanes)))
        loaded = code.load(pointer, align=_BYTES[str(kind)])
        if kind == FLOAT:
            return loaded
        if kind == _BYTE:
            return code.sitofp(loaded, ir.VectorType(FLOAT, lanes))
        wide = code.shl(code.zext(loaded, ir.VectorType(INT, lanes)), self.ints(16, lanes))
        return code.bitcast(wide, ir.VectorType(FLOAT, lanes))

    def load_one(self, address: ir.Value, kind: ir.Type = FLOAT) -> ir.Value:
        """Read one number as a float."""
        return self.code.extract_element(self.load(address, kind, 1), ir.Constant(INT, 0))

    def store(self, vector: ir.Value, address: ir.Value, kind: ir.Type = FLOAT) -> None:
        """Write floats, rounded if need be."""
        code = self.code
        if kind != FLOAT:  # to the nearest, and to the even one of two; what is not a number stays so
            bits = code.bitcast(vector, ir.VectorType(INT, LANES))
            last = code.and_(code.lshr(bits, self.ints(16)), self.ints(1))
            rounded = code.add(bits, code.add(last, self.ints(0x7FFF)))
            quiet = code.or_(bits, self.ints(0x400000))
            bits = code.select(code.fcmp_unordered("uno", vector, vector), quiet, rounded)
            vector = code.trunc(code.lshr(bits, self.ints(16)), ir.VectorType(kind, LANES))
        pointer = code.inttoptr(address, ir.PointerType(vector.type))
        code.store(vector, pointer, align=_BYTES[str(kind)])

    def prefetch(self, address: ir.Value) -> None:
        """Have memory read what will be wanted soon."""
        pointer = self.code.inttoptr(address, ir.PointerType(ir.IntType(8)))
        self.code.call(self._fetch, [pointer, ir.Constant(INT, 0), ir.Constant(INT, 3), ir.Constant(INT, 1)])

    def copy(self, source: ir.Value, target: ir.Value, count: ir.Value) -> None:
        """Copy stored numbers as they are."""
        kind = ir.VectorType(self.stored, LANES)
        with self.loop(count, LANES) as index:
            places = [self.after(address, index, self.stored) for address in (source, target)]
            pointers = [self.code.inttoptr(place, ir.PointerType(kind)) for place in places]
            self.code.store(self.code.load(pointers[0], align=2), pointers[1], align=2)

    def widen(self, stored: ir.Value, floats: ir.Value, count: ir.Value) -> None:
        """Copy stored numbers to floats."""
        with self.loop(count, LANES) as index:
            self.store(self.load(self.after(stored, index, self.stored), self.stored), self.after(floats, index))

    def narrow(self, floats: ir.Value, stored: ir.Value, count: ir.Value) -> None:
        """Copy floats to stored numbers."""
        with self.loop(count, LANES) as index:
            self.store(self.load(self.after(floats, index)), self.after(stored, index, self.stored), self.stored)

    def begin(self, sums: ir.Value, bias: ir.Value, width: ir.Value, stride: ir.Value, rows: int) -> None:
        """Let the sums of all rows begin with a bias or with zeros."""
        for row in range(rows):
            line = self.after(sums, self.code.mul(stride, size(row)))
            with self.loop(width, LANES) as index:
                self.store(zeros(), self.after(line, index))
            self.add(line, bias, width, 1)

    def add(self, sums: ir.Value, bias: ir.Value, width: ir.Value, rows: int) -> None:
        """Add stored numbers to each of some rows of floats, unless their address is 0."""
        code = self.code
        with code.if_then(code.icmp_unsigned("!=", bias, size(0))):
            for row in range(rows):
                line = self.after(sums, code.mul(width, size(row)))
                with self.loop(width, LANES) as index:
                    place = self.after(line, index)
                    added = self.load(self.after(bias, index, self.stored), self.stored)
                    self.store(code.fadd(self.load(place), added), place)

    def ints(self, number: int, lanes: int = LANES) -> ir.Value:
        """A vector of one integer that is known now."""
        return ir.Constant(ir.VectorType(INT, lanes), [number] * lanes)

    def sum_of(self, vector: ir.Value, begin: ir.Value | None = None) -> ir.Value:
        """Sum the numbers of a vector up, from a first one on."""
        begin = ir.Constant(FLOAT, 0.0) if begin is None else begin
        return self.code.call(self._sum, [begin, vector], fastmath=("reassoc",))

    def spread(self, number: ir.Value) -> ir.Value:
        """Make a vector of one number."""
        code = self.code
        one = code.insert_element(ir.Constant(_floats(), ir.Undefined), number, ir.Constant(INT, 0))
        return code.shuffle_vector(one, one, self.ints(0))

    def silu(self, x: ir.Value) -> ir.Value:
        """x by one plus e to the minus x."""
        code = self.code
        return code.fdiv(x, code.fadd(constant(1.0), self.exp(code.fsub(constant(0.0), x))))

    def exp(self, x: ir.Value) -> ir.Value:
        """e to the x, as 2^n times a polynomial of what is left; what is not a number stays so."""
        code = self.code
        x = code.select(code.fcmp_ordered("<", x, constant(-_LARGEST)), constant(-_LARGEST), x)
        x = code.select(code.fcmp_ordered(">", x, constant(_LARGEST)), constant(_LARGEST), x)
        shifted = code.call(self.multiply_add, [x, constant(1.4426950408889634), constant(_ROUNDING)])
        n = code.fsub(shifted, constant(_ROUNDING))
        rest = x
        for part in _LN2:
            rest = code.call(self.multiply_add, [n, constant(-part), rest])
        power = constant(_EXP[0])
        for factor in _EXP[1:]:
            power = code.call(self.multiply_add, [power, rest, constant(factor)])
        power = code.call(self.multiply_add, [power, code.fmul(rest, rest), code.fadd(rest, constant(1.0))])
        exponent = code.shl(code.bitcast(shifted, ir.VectorType(INT, LANES)), self.ints(23))
        two_to_n = code.bitcast(code.add(exponent, self.ints(0x3F800000)), _floats())
        return code.fmul(power, two_to_n)


def size(number: int) -> ir.Value:
    """An integer that is known now."""
    return ir.Constant(SIZE, number)


def _floats() -> ir.Type:
    """The type of a vector of floats."""
    return ir.VectorType(FLOAT, LANES)


def zeros() -> ir.Value:
    """A vector of zeros."""
    return constant(0.0)


def constant(number: float) -> ir.Value:
    """A vector of one number that is known now."""
    rounded = struct.unpack("f", struct.pack("f", number))[0]  # LLVM refuses to round numbers itself
    return ir.Constant(_floats(), [rounded] * LANES)

"""Machine code for the few rows of a decode step, made by LLVM for the very processor that it runs on.

A decode step reads every weight once and computes little with it. In torch each block is a dozen operations, and
between two steps the weights push most of the code behind them out of the processor's caches: a call then costs more
than what it computes. Here a block is three calls (``blocks/fused.py``): from its input to queries, keys and values,
attention for each row, and from what was attended to its output. Numbers come and go in the dtype of the weights; all
between is float32.

Owns the code. Knows addresses and sizes, all of them plain integers; not tensors, blocks or rows of sessions.
"""

# D model width, I inputs of a product, O outputs, W head width, N rows

import ctypes
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Final

import llvmlite.binding as llvm
from llvmlite import ir

__all__ = ["LANES", "ROWS", "Kernel", "kernel"]

Kernel = Callable[..., None]
"""A function of addresses and sizes."""

ROWS: Final = (1, 2, 4, 8)
"""Numbers of rows that there is code for; for more, torch's own products are as fast."""

LANES: Final = 16
"""All widths are multiples of so many."""

_FLOAT, _INT, _SIZE = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_STORED: Final = {"float32": _FLOAT, "bfloat16": ir.IntType(16)}
_EXP: Final = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
"""The polynomial of Cephes' expf (S. Moshier), good to two units in the last place."""
_LN2: Final = (0.693359375, -2.12194440e-4)
_LARGEST: Final = 88.0
_ROUNDING: Final = 12582912.0  # 1.5 * 2^23: what is added to it loses its fraction, and is an integer in its low bits
_MAKING = threading.Lock()


def kernel(dtype: str, name: str, rows: int) -> Kernel:
    """Look up a function; the first time, all for this dtype are made, which takes a fraction of a second.

    Args:
        dtype: Of the weights and of what comes and goes: ``"float32"`` or ``"bfloat16"``.
        name: ``"multiply"``, ``"enter"`` or ``"leave"``; see :class:`_Writer`.
        rows: One of :data:`ROWS`.
    """
    with _MAKING:
        return _library(dtype)[f"{name}_{rows}"]


@cache
def _library(dtype: str) -> dict[str, Kernel]:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=features.flatten(), opt=3
    )
    writer = _Writer(dtype, registers=32 if features.get("avx512f") else 16)
    arguments = writer.write_all()
    writer.module.triple = llvm.get_default_triple()
    module = llvm.parse_assembly(str(writer.module))
    module.verify()
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=2))
    passes.getModulePassManager().run(module, passes)
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    library: dict[str, Kernel] = {}
    for name, count in arguments.items():
        prototype = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * count)  # other threads run meanwhile
        function: Any = prototype(engine.get_function_address(name))
        function.engine = engine  # which owns the code
        library[name] = function
    return library


ENTER: Final = (
    *("width", "norm", "eps", "head_width", "query_norm", "key_norm"),
    *("query", "query_bias", "query_width", "key", "key_bias", "key_width", "value", "value_bias", "value_width"),
)
"""What ``enter`` finds in its table, in this order: addresses of weights, widths, the bits of an epsilon. An address
of 0 is for what is not there."""

LEAVE: Final = (
    *("width", "norm", "eps", "attended_width", "inner_width"),
    *("output", "output_bias", "gate", "gate_bias", "up", "up_bias", "down", "down_bias"),
)
"""What ``leave`` finds in its table."""

ATTEND: Final = (
    *(
        "query",
        "new_key",
        "new_value",
        "keys",
        "values",
        "output",
        "scratch",
        "tokens",
        "heads",
        "groups",
        "width",
        "scaling",
    ),
    *("key_head_stride", "key_stride", "value_head_stride", "value_stride"),
)
"""What ``attend`` takes; strides are in numbers, the scaling is the bits of a float."""


class _Writer:
    """Writes the functions for one dtype.

    * ``multiply(weight, bias, input, output, scratch, I, O, N)``: a product ``[N, I]`` to ``[N, O]``. Scratch:
      ``R (I + O)``, where R is the number of rows in the function's name, and N is at most that.
    * ``enter(table, hidden, cos, sin, output, scratch, N)``: norm, queries, keys and values side by side ``[N, O]``,
      norms of heads, and their rotation by tables ``[N, W]``. Scratch: ``R (D + O)``.
    * ``leave(table, attended, hidden, output, scratch, N)``: output product, residual, norm, gated MLP, residual.
      Scratch: ``R (A + 2 D + 2 I)``, where A is the width of what was attended to, and I the inner one.

    * ``attend(...)``: stores one token's key and value behind those of its row, and lets its heads attend to all of
      them, each key head shared by a group. Scratch:
      ``G (L + W) + W`` and 16 more for each G, where L is the number of tokens, and G that of heads to a key head.

    Arguments are 64-bit integers, addresses most of them; scratch is of 32-bit floats.

    Args:
        dtype: Of weights, inputs and outputs.
        registers: How many vectors of 16 floats, or half as many, the processor holds.
    """

    def __init__(self, dtype: str, *, registers: int) -> None:
        self.module = ir.Module(name=f"corolla_{dtype}")
        self._stored = _STORED[dtype]
        self._registers = registers
        self._multiply_add = self._declare(f"llvm.fma.v{LANES}f32", _floats(), [_floats()] * 3)
        self._sum = self._declare(f"llvm.vector.reduce.fadd.v{LANES}f32", _FLOAT, [_FLOAT, _floats()])
        self._root = self._declare("llvm.sqrt.f32", _FLOAT, [_FLOAT])
        self._largest = self._declare(f"llvm.vector.reduce.fmax.v{LANES}f32", _FLOAT, [_floats()])
        pointer = ir.PointerType(ir.IntType(8))
        self._fetch = self._declare("llvm.prefetch.p0", ir.VoidType(), [pointer, _INT, _INT, _INT])
        self._code = ir.IRBuilder()
        self._norm = self._write("norm", 5, self._write_norm)
        self._turn = self._write("turn", 7, self._write_turn)
        self._products = {rows: self._write(f"product_{rows}", 6, self._write_product, rows) for rows in ROWS}

    def write_all(self) -> dict[str, int]:
        """Write all functions for other languages, and say how many arguments each takes."""
        counts = {}
        for rows in ROWS:
            for name, count, write in (
                ("multiply", 8, self._write_multiply),
                ("enter", 7, self._write_enter),
                ("leave", 6, self._write_leave),
            ):
                self._write(f"{name}_{rows}", count, write, rows, is_public=True)
                counts[f"{name}_{rows}"] = count
        self._write("attend_1", len(ATTEND), self._write_attend, is_public=True)
        return counts | {"attend_1": len(ATTEND)}

    # Functions

    def _write_multiply(self, arguments: Sequence[Any], rows: int) -> None:
        weight, bias, numbers, output, scratch, inputs, outputs, count = arguments
        code = self._code
        sums = self._after(scratch, code.mul(inputs, _size(rows)))
        self._widen(numbers, scratch, code.mul(inputs, count))
        self._begin(sums, bias, outputs, outputs, rows)
        code.call(self._products[rows], [weight, scratch, sums, inputs, outputs, outputs])
        self._narrow(sums, output, code.mul(outputs, count))

    def _write_enter(self, arguments: Sequence[Any], rows: int) -> None:
        table, hidden, cos, sin, output, scratch, count = arguments
        code, entry = self._code, self._entries(table, ENTER)
        width, eps, head_width = entry["width"], entry["eps"], entry["head_width"]
        total = code.add(entry["query_width"], code.add(entry["key_width"], entry["value_width"]))
        sums = self._after(scratch, code.mul(width, _size(rows)))
        self._widen(hidden, scratch, code.mul(width, count))
        with self._loop(count) as row:
            place = self._after(scratch, code.mul(row, width))
            code.call(self._norm, [place, entry["norm"], place, width, eps])
        place = sums
        for name in ("query", "key", "value"):
            outputs = entry[f"{name}_width"]
            self._begin(place, entry[f"{name}_bias"], outputs, total, rows)
            code.call(self._products[rows], [entry[name], scratch, place, width, outputs, total])
            place = self._after(place, outputs)
        with self._loop(count) as row:
            offset = code.mul(row, head_width)
            tables = [self._after(cos, offset, self._stored), self._after(sin, offset, self._stored)]
            place = self._after(sums, code.mul(row, total))
            for name in ("query", "key"):
                outputs = entry[f"{name}_width"]
                code.call(self._turn, [place, outputs, entry[f"{name}_norm"], eps, *tables, head_width])
                place = self._after(place, outputs)
        self._narrow(sums, output, code.mul(total, count))

    def _write_leave(self, arguments: Sequence[Any], rows: int) -> None:
        table, attended, hidden, output, scratch, count = arguments
        code, entry = self._code, self._entries(table, LEAVE)
        width, inner, attended_width = entry["width"], entry["inner_width"], entry["attended_width"]
        product = self._products[rows]
        sums = self._after(scratch, code.mul(attended_width, _size(rows)))
        normed = self._after(sums, code.mul(width, _size(rows)))
        gate = self._after(normed, code.mul(width, _size(rows)))
        up = self._after(gate, code.mul(inner, _size(rows)))
        self._widen(attended, scratch, code.mul(attended_width, count))
        self._widen(hidden, sums, code.mul(width, count))
        self._add_bias(sums, entry["output_bias"], width, rows)
        code.call(product, [entry["output"], scratch, sums, attended_width, width, width])
        with self._loop(count) as row:
            offset = code.mul(row, width)
            places = self._after(sums, offset), self._after(normed, offset)
            code.call(self._norm, [places[0], entry["norm"], places[1], width, entry["eps"]])
        for name, place in (("gate", gate), ("up", up)):
            self._begin(place, entry[f"{name}_bias"], inner, inner, rows)
            code.call(product, [entry[name], normed, place, width, inner, inner])
        with self._loop(code.mul(inner, count), LANES) as index:
            place = self._after(gate, index)
            gated = code.fmul(self._silu(self._load(place)), self._load(self._after(up, index)))
            self._store(gated, place)
        self._add_bias(sums, entry["down_bias"], width, rows)
        code.call(product, [entry["down"], gate, sums, inner, width, width])
        self._narrow(sums, output, code.mul(width, count))

    def _write_attend(self, arguments: Sequence[Any]) -> None:
        code, given = self._code, dict(zip(ATTEND, arguments, strict=True))
        tokens, groups, width = given["tokens"], given["groups"], given["width"]
        padded = code.and_(code.add(tokens, _size(LANES - 1)), _size(-LANES))
        queries = given["scratch"]
        mixed = self._after(queries, width)
        scores = self._after(mixed, code.mul(groups, width))
        with self._loop(given["heads"]) as head:
            keys = self._after(given["keys"], code.mul(head, given["key_head_stride"]), self._stored)
            values = self._after(given["values"], code.mul(head, given["value_head_stride"]), self._stored)
            first = code.mul(head, code.mul(groups, width))
            for new, place, stride in (("new_key", keys, "key_stride"), ("new_value", values, "value_stride")):
                last = code.mul(code.sub(tokens, _size(1)), given[stride])
                new_head = self._after(given[new], code.mul(head, width), self._stored)
                self._copy(new_head, self._after(place, last, self._stored), width)
            with self._loop(groups) as member:
                line = self._after(scores, code.mul(member, padded))
                query = self._after(given["query"], code.add(first, code.mul(member, width)), self._stored)
                self._widen(query, queries, width)
                with self._loop(padded, LANES, start=code.sub(padded, _size(LANES))) as index:
                    self._store(_constant(float("-inf")), self._after(line, index))
                self._write_scores(given, queries, keys, line)
                self._write_softmax(line, padded)
                with self._loop(width, LANES) as index:
                    self._store(_zeros(), self._after(mixed, code.add(code.mul(member, width), index)))
            with self._loop(tokens) as token, self._loop(groups) as member:
                place = self._after(scores, code.add(code.mul(member, padded), token))
                weight = self._spread(code.load(code.inttoptr(place, ir.PointerType(_FLOAT))))
                value = self._after(values, code.mul(token, given["value_stride"]), self._stored)
                with self._loop(width, LANES) as index:
                    place = self._after(mixed, code.add(code.mul(member, width), index))
                    found = self._load(self._after(value, index, self._stored), self._stored)
                    self._store(code.call(self._multiply_add, [weight, found, self._load(place)]), place)
            self._narrow(mixed, self._after(given["output"], first, self._stored), code.mul(groups, width))

    def _write_scores(self, given: dict[str, Any], query: Any, keys: Any, scores: Any) -> None:
        code = self._code
        scaling = code.bitcast(code.trunc(given["scaling"], _INT), _FLOAT)
        with self._loop(given["tokens"]) as token:
            key = self._after(keys, code.mul(token, given["key_stride"]), self._stored)
            found = self._variable(_zeros())
            with self._loop(given["width"], LANES) as index:
                pair = (
                    self._load(self._after(query, index)),
                    self._load(self._after(key, index, self._stored), self._stored),
                )
                code.store(code.call(self._multiply_add, [*pair, code.load(found)]), found)
            score = code.fmul(self._sum_of(code.load(found)), scaling)
            code.store(score, code.inttoptr(self._after(scores, token), ir.PointerType(_FLOAT)))

    def _write_softmax(self, scores: Any, count: Any) -> None:
        code = self._code
        largest, total = self._variable(_constant(float("-inf"))), self._variable(_zeros())
        with self._loop(count, LANES) as index:
            vector, found = self._load(self._after(scores, index)), code.load(largest)
            code.store(code.select(code.fcmp_ordered(">", vector, found), vector, found), largest)
        top = self._spread(code.call(self._largest, [code.load(largest)]))
        with self._loop(count, LANES) as index:
            power = self._exp(code.fsub(self._load(self._after(scores, index)), top))
            self._store(power, self._after(scores, index))
            code.store(code.fadd(power, code.load(total)), total)
        share = self._spread(code.fdiv(ir.Constant(_FLOAT, 1.0), self._sum_of(code.load(total))))
        with self._loop(count, LANES) as index:
            place = self._after(scores, index)
            self._store(code.fmul(self._load(place), share), place)

    def _write_product(self, arguments: Sequence[Any], rows: int) -> None:
        """Add to sums ``[N, stride]`` the products of a weight ``[O, I]`` and numbers ``[N, I]``."""
        *_, outputs, _ = arguments
        at_once = max(1, min(4, self._registers // 2 // rows))
        whole = self._code.and_(outputs, _size(-at_once))
        self._write_sums(arguments, rows, at_once, (_size(0), whole))
        if at_once > 1:
            self._write_sums(arguments, rows, 1, (whole, outputs))

    def _write_sums(self, arguments: Sequence[Any], rows: int, at_once: int, reach: tuple[Any, Any]) -> None:
        weight, numbers, sums, inputs, _, stride = arguments
        code = self._code
        starts = [self._after(numbers, code.mul(inputs, _size(row))) for row in range(rows)]
        with self._loop(reach[1], at_once, start=reach[0]) as output:
            lines = [
                self._after(weight, code.mul(code.add(output, _size(line)), inputs), self._stored)
                for line in range(at_once)
            ]
            ahead = code.mul(inputs, _size(at_once))
            found = [[self._variable(_zeros()) for _ in range(rows)] for _ in range(at_once)]
            with self._loop(inputs, LANES) as index:
                numbers_N = [self._load(self._after(start, index)) for start in starts]
                for line, line_found in zip(lines, found, strict=True):
                    self._prefetch(self._after(line, code.add(index, ahead), self._stored))
                    weights = self._load(self._after(line, index, self._stored), self._stored)
                    for number, one in zip(numbers_N, line_found, strict=True):
                        code.store(code.call(self._multiply_add, [weights, number, code.load(one)]), one)
            for line, line_found in enumerate(found):
                for row, one in enumerate(line_found):
                    place = self._after(sums, code.add(code.mul(stride, _size(row)), code.add(output, _size(line))))
                    pointer = code.inttoptr(place, ir.PointerType(_FLOAT))
                    code.store(self._sum_of(code.load(one), code.load(pointer)), pointer)

    def _write_norm(self, arguments: Sequence[Any]) -> None:
        """Divide numbers by the root of their mean square, and multiply them with weights."""
        numbers, weight, output, width, eps = arguments
        code = self._code
        squares = self._variable(_zeros())
        with self._loop(width, LANES) as index:
            vector = self._load(self._after(numbers, index))
            code.store(code.call(self._multiply_add, [vector, vector, code.load(squares)]), squares)
        mean = code.fdiv(self._sum_of(code.load(squares)), code.sitofp(width, _FLOAT))
        root = code.call(self._root, [code.fadd(mean, code.bitcast(code.trunc(eps, _INT), _FLOAT))])
        scale = self._spread(code.fdiv(ir.Constant(_FLOAT, 1.0), root))
        with self._loop(width, LANES) as index:
            weights = self._load(self._after(weight, index, self._stored), self._stored)
            normed = code.fmul(code.fmul(self._load(self._after(numbers, index)), scale), weights)
            self._store(normed, self._after(output, index))

    def _write_turn(self, arguments: Sequence[Any]) -> None:
        """Rotate heads, side by side, after a norm, if there is one."""
        heads, total, norm, eps, cos, sin, width = arguments
        code, lanes = self._code, LANES // 2
        half = code.lshr(width, _size(1))
        with self._loop(code.udiv(total, width)) as head:
            place = self._after(heads, code.mul(head, width))
            with code.if_then(code.icmp_unsigned("!=", norm, _size(0))):
                code.call(self._norm, [place, norm, place, width, eps])
            with self._loop(half, lanes) as index:
                offsets = index, code.add(index, half)
                places = [self._after(place, offset) for offset in offsets]
                low, high = (self._load(place, lanes=lanes) for place in places)
                cosines, sines = (
                    [self._load(self._after(table, offset, self._stored), self._stored, lanes) for offset in offsets]
                    for table in (cos, sin)
                )
                self._store(code.fsub(code.fmul(low, cosines[0]), code.fmul(high, sines[0])), places[0])
                self._store(code.fadd(code.fmul(high, cosines[1]), code.fmul(low, sines[1])), places[1])

    # What functions are made of

    def _declare(self, name: str, returned: Any, arguments: Sequence[Any]) -> Any:
        return ir.Function(self.module, ir.FunctionType(returned, arguments), name=name)

    def _write(self, name: str, count: int, write: Callable[..., None], *further: int, is_public: bool = False) -> Any:
        function = self._declare(name, ir.VoidType(), [_SIZE] * count)
        function.linkage = "external" if is_public else "internal"
        self._code = ir.IRBuilder(function.append_basic_block("entry"))
        write(function.args, *further)
        self._code.ret_void()
        return function

    @contextmanager
    def _loop(self, stop: Any, step: int = 1, start: Any = None) -> Iterator[Any]:
        """Count; yields the index."""
        code, start = self._code, _size(0) if start is None else start
        before = code.block
        head, body, after = (code.append_basic_block(name) for name in ("head", "body", "after"))
        code.branch(head)
        code.position_at_end(head)
        index = code.phi(_SIZE)
        index.add_incoming(start, before)
        code.cbranch(code.icmp_signed("<", index, stop), body, after)
        code.position_at_end(body)
        yield index
        index.add_incoming(code.add(index, _size(step)), code.block)
        code.branch(head)
        code.position_at_end(after)

    def _variable(self, value: Any) -> Any:
        """Make a place for what changes in a loop; LLVM finds a register for it."""
        with self._code.goto_entry_block():
            place = self._code.alloca(value.type)
        self._code.store(value, place)
        return place

    def _entries(self, table: Any, names: Sequence[str]) -> dict[str, Any]:
        pointer = self._code.inttoptr(table, ir.PointerType(_SIZE))
        return {name: self._code.load(self._code.gep(pointer, [_size(place)])) for place, name in enumerate(names)}

    def _after(self, address: Any, count: Any, kind: Any = _FLOAT) -> Any:
        """The address of what comes so many numbers later."""
        return self._code.add(address, self._code.mul(count, _size(2 if kind == _STORED["bfloat16"] else 4)))

    def _load(self, address: Any, kind: Any = _FLOAT, lanes: int = LANES) -> Any:
        code = self._code
        pointer = code.inttoptr(address, ir.PointerType(ir.VectorType(kind, lanes)))
        loaded = code.load(pointer, align=2 if kind == _STORED["bfloat16"] else 4)
        if kind == _FLOAT:
            return loaded
        wide = code.shl(code.zext(loaded, ir.VectorType(_INT, lanes)), _ints(16, lanes))
        return code.bitcast(wide, ir.VectorType(_FLOAT, lanes))

    def _store(self, vector: Any, address: Any, kind: Any = _FLOAT) -> None:
        code = self._code
        if kind != _FLOAT:  # to the nearest, and to the even one of two; what is not a number stays so
            bits = code.bitcast(vector, ir.VectorType(_INT, LANES))
            last = code.and_(code.lshr(bits, _ints(16)), _ints(1))
            rounded = code.add(bits, code.add(last, _ints(0x7FFF)))
            quiet = code.or_(bits, _ints(0x400000))
            bits = code.select(code.fcmp_unordered("uno", vector, vector), quiet, rounded)
            vector = code.trunc(code.lshr(bits, _ints(16)), ir.VectorType(kind, LANES))
        pointer = code.inttoptr(address, ir.PointerType(vector.type))
        code.store(vector, pointer, align=2 if kind == _STORED["bfloat16"] else 4)

    def _prefetch(self, address: Any) -> None:
        """Have memory read what will be wanted soon."""
        pointer = self._code.inttoptr(address, ir.PointerType(ir.IntType(8)))
        self._code.call(self._fetch, [pointer, ir.Constant(_INT, 0), ir.Constant(_INT, 3), ir.Constant(_INT, 1)])

    def _copy(self, source: Any, target: Any, count: Any) -> None:
        kind = ir.VectorType(self._stored, LANES)
        with self._loop(count, LANES) as index:
            places = [self._after(address, index, self._stored) for address in (source, target)]
            pointers = [self._code.inttoptr(place, ir.PointerType(kind)) for place in places]
            self._code.store(self._code.load(pointers[0], align=2), pointers[1], align=2)

    def _widen(self, stored: Any, floats: Any, count: Any) -> None:
        with self._loop(count, LANES) as index:
            self._store(self._load(self._after(stored, index, self._stored), self._stored), self._after(floats, index))

    def _narrow(self, floats: Any, stored: Any, count: Any) -> None:
        with self._loop(count, LANES) as index:
            self._store(self._load(self._after(floats, index)), self._after(stored, index, self._stored), self._stored)

    def _begin(self, sums: Any, bias: Any, width: Any, stride: Any, rows: int) -> None:
        """Let the sums of all rows begin with a bias or with zeros."""
        for row in range(rows):
            line = self._after(sums, self._code.mul(stride, _size(row)))
            with self._loop(width, LANES) as index:
                self._store(_zeros(), self._after(line, index))
            self._add_bias(line, bias, width, 1)

    def _add_bias(self, sums: Any, bias: Any, width: Any, rows: int) -> None:
        code = self._code
        with code.if_then(code.icmp_unsigned("!=", bias, _size(0))):
            for row in range(rows):
                line = self._after(sums, code.mul(width, _size(row)))
                with self._loop(width, LANES) as index:
                    place = self._after(line, index)
                    added = self._load(self._after(bias, index, self._stored), self._stored)
                    self._store(code.fadd(self._load(place), added), place)

    def _sum_of(self, vector: Any, begin: Any = None) -> Any:
        begin = ir.Constant(_FLOAT, 0.0) if begin is None else begin
        return self._code.call(self._sum, [begin, vector], fastmath=("reassoc",))

    def _spread(self, number: Any) -> Any:
        code = self._code
        one = code.insert_element(ir.Constant(_floats(), ir.Undefined), number, ir.Constant(_INT, 0))
        return code.shuffle_vector(one, one, _ints(0))

    def _silu(self, x: Any) -> Any:
        code = self._code
        return code.fdiv(x, code.fadd(_constant(1.0), self._exp(code.fsub(_constant(0.0), x))))

    def _exp(self, x: Any) -> Any:
        """e to the x, as 2^n times a polynomial of what is left; what is not a number stays so."""
        code = self._code
        x = code.select(code.fcmp_ordered("<", x, _constant(-_LARGEST)), _constant(-_LARGEST), x)
        x = code.select(code.fcmp_ordered(">", x, _constant(_LARGEST)), _constant(_LARGEST), x)
        shifted = code.call(self._multiply_add, [x, _constant(1.4426950408889634), _constant(_ROUNDING)])
        n = code.fsub(shifted, _constant(_ROUNDING))
        rest = x
        for part in _LN2:
            rest = code.call(self._multiply_add, [n, _constant(-part), rest])
        power = _constant(_EXP[0])
        for factor in _EXP[1:]:
            power = code.call(self._multiply_add, [power, rest, _constant(factor)])
        power = code.call(self._multiply_add, [power, code.fmul(rest, rest), code.fadd(rest, _constant(1.0))])
        exponent = code.shl(code.bitcast(shifted, ir.VectorType(_INT, LANES)), _ints(23))
        two_to_n = code.bitcast(code.add(exponent, _ints(0x3F800000)), _floats())
        return code.fmul(power, two_to_n)


def _size(number: int) -> Any:
    return ir.Constant(_SIZE, number)


def _floats() -> Any:
    return ir.VectorType(_FLOAT, LANES)


def _zeros() -> Any:
    return _constant(0.0)


def _constant(number: float) -> Any:
    return ir.Constant(_floats(), [ir.Constant(_FLOAT, float(struct.unpack("f", struct.pack("f", number))[0]))] * LANES)


def _ints(number: int, lanes: int = LANES) -> Any:
    return ir.Constant(ir.VectorType(_INT, lanes), [number] * lanes)

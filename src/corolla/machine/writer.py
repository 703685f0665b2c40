"""The functions that a decode step is made of, as LLVM's IR.

Knows products, norms and heads; not who calls, nor what becomes of the code.
"""

# A attended width, D model width, G queries to a key head, I inputs of a product, L stored tokens, N rows, O outputs
# R rows that the code is for, W head width

from collections.abc import Callable, Sequence
from typing import Final

from llvmlite import ir

from corolla.machine.products import ProductCode
from corolla.machine.vectors import FLOAT, INT, LANES, constant, size, zeros

__all__ = ["ATTEND", "ENTER", "LEAVE", "ROWS", "Writer"]

ROWS: Final = (1, 2, 4, 8)
"""Numbers of rows that there is code for; for more, torch's own products are as fast."""

ENTER: Final = (
    *("width", "norm", "eps", "head_width", "query_norm", "key_norm"),
    *("query", "query_scales", "query_bias", "query_width", "key", "key_scales", "key_bias", "key_width"),
    *("value", "value_scales", "value_bias", "value_width"),
)
"""What ``enter`` finds in its table, in this order: addresses of weights, widths, the bits of an epsilon. An address
of 0 is for what is not there."""

LEAVE: Final = (
    *("width", "norm", "eps", "attended_width", "inner_width"),
    *("output", "output_scales", "output_bias", "gate", "gate_scales", "gate_bias"),
    *("up", "up_scales", "up_bias", "down", "down_scales", "down_bias"),
)
"""What ``leave`` finds in its table."""

ATTEND: Final = (
    *("query", "new_key", "new_value", "keys", "values", "output", "scratch"),
    *("tokens", "heads", "groups", "width", "scaling"),
    *("key_head_stride", "key_stride", "value_head_stride", "value_stride"),
)
"""What ``attend`` takes; strides are in numbers, the scaling is the bits of a float."""


class Writer(ProductCode):
    """Writes the functions for one dtype and one form of weights.

    * ``multiply(weight, scales, bias, input, output, scratch, I, O, N)``: a product ``[N, I]`` to ``[N, O]``. Scratch:
      ``R (I + O)``, where R is the number of rows in the function's name, and N is at most that.
    * ``enter(table, hidden, cos, sin, output, scratch, N)``: norm, queries, keys and values side by side ``[N, O]``,
      norms of heads, and their rotation by tables ``[N, W]``. Scratch: ``R (D + O)``.
    * ``leave(table, attended, hidden, output, scratch, N)``: output product, residual, norm, gated MLP, residual.
      Scratch: ``R (A + 2 D + 2 I)``, where A is the width of what was attended to, and I the inner one.
    * ``attend(...)``, see :data:`ATTEND`: stores one token's key and value behind those of its row, and lets its heads
      attend to all of them, each key head shared by a group of G. Scratch: ``W + G (W + L + 16)`` for L tokens.

    Arguments are 64-bit integers, addresses most of them; scratch is of 32-bit floats.

    Args:
        dtype: Of inputs, outputs, norms and biases, and of weights as they are.
        form: How weights are stored; see :class:`corolla.machine.products.ProductCode`.
        threads: How many threads compute a product.
        registers: How many vectors of 16 floats, or half as many, the processor holds.
    """

    def __init__(self, dtype: str, form: str, *, threads: int, registers: int) -> None:
        super().__init__(dtype, form, threads=threads, registers=registers)
        self._norm = self.write("norm", 5, self._write_norm)
        self._turn = self.write("turn", 7, self._write_turn)
        self._products = {rows: self.write_product(rows) for rows in ROWS}

    def write_products(self) -> dict[str, int]:
        """Write ``multiply``, and say how many arguments each function takes."""
        return self._write_for_rows({"multiply": (9, self._write_multiply)})

    def write_blocks(self) -> dict[str, int]:
        """Write ``enter``, ``leave`` and ``attend``, and say how many arguments each function takes."""
        counts = self._write_for_rows({"enter": (7, self._write_enter), "leave": (6, self._write_leave)})
        self.write("attend_1", len(ATTEND), self._write_attend, is_public=True)
        return counts | {"attend_1": len(ATTEND)}

    def _write_for_rows(self, functions: dict[str, tuple[int, Callable[..., None]]]) -> dict[str, int]:
        counts = {}
        for rows in ROWS:
            for name, (count, write) in functions.items():
                self.write(f"{name}_{rows}", count, write, rows, is_public=True)
                counts[f"{name}_{rows}"] = count
        return counts

    def _write_multiply(self, arguments: Sequence[ir.Value], rows: int) -> None:
        weight, scales, bias, numbers, output, scratch, inputs, outputs, count = arguments
        code = self.code
        sums = self.after(scratch, code.mul(inputs, size(rows)))
        self.widen(numbers, scratch, code.mul(inputs, count))
        self.begin(sums, bias, outputs, outputs, rows)
        code.call(self._products[rows], [weight, scales, scratch, sums, inputs, outputs, outputs])
        self.narrow(sums, output, code.mul(outputs, count))

    def _write_enter(self, arguments: Sequence[ir.Value], rows: int) -> None:
        table, hidden, cos, sin, output, scratch, count = arguments
        code, entry = self.code, self.entries(table, ENTER)
        width, eps, head_width = entry["width"], entry["eps"], entry["head_width"]
        total = code.add(entry["query_width"], code.add(entry["key_width"], entry["value_width"]))
        sums = self.after(scratch, code.mul(width, size(rows)))
        self.widen(hidden, scratch, code.mul(width, count))
        with self.loop(count) as row:
            place = self.after(scratch, code.mul(row, width))
            code.call(self._norm, [place, entry["norm"], place, width, eps])
        place = sums
        weight = {name: (entry[name], entry[f"{name}_scales"]) for name in ("query", "key", "value")}
        for name in weight:
            outputs = entry[f"{name}_width"]
            self.begin(place, entry[f"{name}_bias"], outputs, total, rows)
            code.call(self._products[rows], [*weight[name], scratch, place, width, outputs, total])
            place = self.after(place, outputs)
        with self.loop(count) as row:
            offset = code.mul(row, head_width)
            tables = [self.after(cos, offset, self.stored), self.after(sin, offset, self.stored)]
            place = self.after(sums, code.mul(row, total))
            for name in ("query", "key"):
                outputs = entry[f"{name}_width"]
                code.call(self._turn, [place, outputs, entry[f"{name}_norm"], eps, *tables, head_width])
                place = self.after(place, outputs)
        self.narrow(sums, output, code.mul(total, count))

    def _write_leave(self, arguments: Sequence[ir.Value], rows: int) -> None:
        table, attended, hidden, output, scratch, count = arguments
        code, entry = self.code, self.entries(table, LEAVE)
        width, inner, attended_width = entry["width"], entry["inner_width"], entry["attended_width"]
        product = self._products[rows]
        weight = {name: (entry[name], entry[f"{name}_scales"]) for name in ("output", "gate", "up", "down")}
        sums = self.after(scratch, code.mul(attended_width, size(rows)))
        normed = self.after(sums, code.mul(width, size(rows)))
        gate = self.after(normed, code.mul(width, size(rows)))
        up = self.after(gate, code.mul(inner, size(rows)))
        self.widen(attended, scratch, code.mul(attended_width, count))
        self.widen(hidden, sums, code.mul(width, count))
        self.add(sums, entry["output_bias"], width, rows)
        code.call(product, [*weight["output"], scratch, sums, attended_width, width, width])
        with self.loop(count) as row:
            offset = code.mul(row, width)
            places = self.after(sums, offset), self.after(normed, offset)
            code.call(self._norm, [places[0], entry["norm"], places[1], width, entry["eps"]])
        for name, place in (("gate", gate), ("up", up)):
            self.begin(place, entry[f"{name}_bias"], inner, inner, rows)
            code.call(product, [*weight[name], normed, place, width, inner, inner])
        with self.loop(code.mul(inner, count), LANES) as index:
            place = self.after(gate, index)
            gated = code.fmul(self.silu(self.load(place)), self.load(self.after(up, index)))
            self.store(gated, place)
        self.add(sums, entry["down_bias"], width, rows)
        code.call(product, [*weight["down"], gate, sums, inner, width, width])
        self.narrow(sums, output, code.mul(width, count))

    def _write_attend(self, arguments: Sequence[ir.Value]) -> None:
        code, given = self.code, dict(zip(ATTEND, arguments, strict=True))
        tokens, groups, width = given["tokens"], given["groups"], given["width"]
        padded = code.and_(code.add(tokens, size(LANES - 1)), size(-LANES))
        queries = given["scratch"]
        mixed = self.after(queries, width)
        scores = self.after(mixed, code.mul(groups, width))
        with self.loop(given["heads"]) as head:
            keys = self.after(given["keys"], code.mul(head, given["key_head_stride"]), self.stored)
            values = self.after(given["values"], code.mul(head, given["value_head_stride"]), self.stored)
            first = code.mul(head, code.mul(groups, width))
            for new, place, stride in (("new_key", keys, "key_stride"), ("new_value", values, "value_stride")):
                last = code.mul(code.sub(tokens, size(1)), given[stride])
                new_head = self.after(given[new], code.mul(head, width), self.stored)
                self.copy(new_head, self.after(place, last, self.stored), width)
            with self.loop(groups) as member:
                line = self.after(scores, code.mul(member, padded))
                query = self.after(given["query"], code.add(first, code.mul(member, width)), self.stored)
                self.widen(query, queries, width)
                with self.loop(padded, LANES, start=code.sub(padded, size(LANES))) as index:
                    self.store(constant(float("-inf")), self.after(line, index))
                self._write_scores(given, queries, keys, line)
                self._write_softmax(line, padded)
                with self.loop(width, LANES) as index:
                    self.store(zeros(), self.after(mixed, code.add(code.mul(member, width), index)))
            with self.loop(tokens) as token, self.loop(groups) as member:
                place = self.after(scores, code.add(code.mul(member, padded), token))
                weight = self.spread(code.load(code.inttoptr(place, ir.PointerType(FLOAT))))
                value = self.after(values, code.mul(token, given["value_stride"]), self.stored)
                with self.loop(width, LANES) as index:
                    place = self.after(mixed, code.add(code.mul(member, width), index))
                    found = self.load(self.after(value, index, self.stored), self.stored)
                    self.store(code.call(self.multiply_add, [weight, found, self.load(place)]), place)
            self.narrow(mixed, self.after(given["output"], first, self.stored), code.mul(groups, width))

    def _write_scores(self, given: dict[str, ir.Value], query: ir.Value, keys: ir.Value, scores: ir.Value) -> None:
        code = self.code
        scaling = code.bitcast(code.trunc(given["scaling"], INT), FLOAT)
        with self.loop(given["tokens"]) as token:
            key = self.after(keys, code.mul(token, given["key_stride"]), self.stored)
            found = self.variable(zeros())
            with self.loop(given["width"], LANES) as index:
                pair = (
                    self.load(self.after(query, index)),
                    self.load(self.after(key, index, self.stored), self.stored),
                )
                code.store(code.call(self.multiply_add, [*pair, code.load(found)]), found)
            score = code.fmul(self.sum_of(code.load(found)), scaling)
            code.store(score, code.inttoptr(self.after(scores, token), ir.PointerType(FLOAT)))

    def _write_softmax(self, scores: ir.Value, count: ir.Value) -> None:
        code = self.code
        largest, total = self.variable(constant(float("-inf"))), self.variable(zeros())
        with self.loop(count, LANES) as index:
            vector, found = self.load(self.after(scores, index)), code.load(largest)
            code.store(code.select(code.fcmp_ordered(">", vector, found), vector, found), largest)
        top = self.spread(code.call(self.largest, [code.load(largest)]))
        with self.loop(count, LANES) as index:
            power = self.exp(code.fsub(self.load(self.after(scores, index)), top))
            self.store(power, self.after(scores, index))
            code.store(code.fadd(power, code.load(total)), total)
        share = self.spread(code.fdiv(ir.Constant(FLOAT, 1.0), self.sum_of(code.load(total))))
        with self.loop(count, LANES) as index:
            place = self.after(scores, index)
            self.store(code.fmul(self.load(place), share), place)

    def _write_norm(self, arguments: Sequence[ir.Value]) -> None:
        """Divide numbers by the root of their mean square, and multiply them with weights."""
        numbers, weight, output, width, eps = arguments
        code = self.code
        squares = self.variable(zeros())
        with self.loop(width, LANES) as index:
            vector = self.load(self.after(numbers, index))
            code.store(code.call(self.multiply_add, [vector, vector, code.load(squares)]), squares)
        mean = code.fdiv(self.sum_of(code.load(squares)), code.sitofp(width, FLOAT))
        root = code.call(self.root, [code.fadd(mean, code.bitcast(code.trunc(eps, INT), FLOAT))])
        scale = self.spread(code.fdiv(ir.Constant(FLOAT, 1.0), root))
        with self.loop(width, LANES) as index:
            weights = self.load(self.after(weight, index, self.stored), self.stored)
            normed = code.fmul(code.fmul(self.load(self.after(numbers, index)), scale), weights)
            self.store(normed, self.after(output, index))

    def _write_turn(self, arguments: Sequence[ir.Value]) -> None:
        """Rotate heads, side by side, after a norm, if there is one."""
        heads, total, norm, eps, cos, sin, width = arguments
        code, lanes = self.code, LANES // 2
        half = code.lshr(width, size(1))
        with self.loop(code.udiv(total, width)) as head:
            place = self.after(heads, code.mul(head, width))
            with code.if_then(code.icmp_unsigned("!=", norm, size(0))):
                code.call(self._norm, [place, norm, place, width, eps])
            with self.loop(half, lanes) as index:
                offsets = index, code.add(index, half)
                places = [self.after(place, offset) for offset in offsets]
                low, high = (self.load(place, lanes=lanes) for place in places)
                cosines, sines = (
                    [self.load(self.after(table, offset, self.stored), self.stored, lanes) for offset in offsets]
                    for table in (cos, sin)
                )
                self.store(code.fsub(code.fmul(low, cosines[0]), code.fmul(high, sines[0])), places[0])
                self.store(code.fadd(code.fmul(high, cosines[1]), code.fmul(low, sines[1])), places[1])

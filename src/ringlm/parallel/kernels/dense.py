"""Unpacked matrices times a few activations: weights of 16 or 32 bits, read once and as fast as memory gives them.

torch reads half types at half of that for one activation where a CPU has no AMX, and takes two to three times as long
for 2 to 16 activations in float32 as for one (docs/performance.md). A result is summed in float32, in an order that
knows nothing of the other activations: a sequence's are the same to the bit whatever is computed beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from llvmlite import ir
from numba import config, njit, prange, set_num_threads, types
from numba.core import cgutils
from numba.extending import intrinsic

from ringlm.parallel.kernels import instructions as at
from ringlm.parallel.kernels.instructions import F16, F32, I8, I16, I32, I64, WIDE, constant, load, vector
from ringlm.parallel.kernels.variants import compiled

KINDS: Final = (torch.float32, torch.bfloat16, torch.float16)  # of a matrix

_LANES: Final = 16 if WIDE else 8  # columns at a time
_ROWS: Final = 8 if WIDE else 4  # times two activations: as many sums as fit the registers
_HALF: Final = _ROWS // 2  # of them times four
_AHEAD_BYTES: Final = 1024  # in each row; products.py says why
_ELEMENTS: Final = (F32, I16, F16)
_SIZES: Final = tuple(kind.itemsize for kind in KINDS)


@intrinsic(prefer_literal=True)
def _tile(typing, kind, rows, tokens, weights, x, out, columns, stride):
    """`rows` rows times `tokens` activations, both one behind the other, to float32 out[token * stride + row]. All
    arguments are integers, pointers included; `kind`, of KINDS, `rows` and `tokens` are literals."""
    element = _ELEMENTS[kind.literal_value]
    height, count = range(rows.literal_value), range(tokens.literal_value)
    signature = types.void(kind, rows, tokens, *[types.intp] * 5)

    def widen(b: at.Builder, values: at.Value) -> at.Value:
        if element is I16:  # a bfloat16 is the upper half of a float32
            wide = b.shl(b.zext(values, vector(I32, _LANES)), constant(I32, 16, _LANES))
            return b.bitcast(wide, vector(F32, _LANES))
        return b.fpext(values, vector(F32, _LANES)) if element is F16 else values

    def generate(context: Any, b: at.Builder, signature: Any, arguments: Any) -> at.Value:
        weights, x, out = (
            b.inttoptr(value, to.as_pointer()) for value, to in zip(arguments[3:6], (element, F32, F32), strict=True)
        )
        columns, stride = arguments[6:]

        def row(base: at.Value, number: int, length: at.Value) -> at.Value:
            return b.gep(base, [b.mul(length, ir.Constant(I64, number))])

        w_rows, x_rows = ([row(base, n, columns) for n in many] for base, many in ((weights, height), (x, count)))
        totals = [[cgutils.alloca_once_value(b, constant(F32, 0.0, _LANES)) for _ in count] for _ in height]

        def add(place: at.Value, take: Callable[[at.Value, Any], at.Value]) -> None:
            """Columns from `place` on, which `take` loads, to the totals."""
            pieces = [take(b.gep(x_row, [place]), F32) for x_row in x_rows]
            for w_row, sums in zip(w_rows, totals, strict=True):
                values = widen(b, take(b.gep(w_row, [place]), element))
                for piece, total in zip(pieces, sums, strict=True):
                    b.store(at.multiply_add(b, values, piece, b.load(total)), total)

        with cgutils.for_range(b, b.udiv(columns, ir.Constant(I64, _LANES))) as loop:
            place = b.mul(loop.index, ir.Constant(I64, _LANES))
            for w_row in w_rows:
                at.prefetch(b, b.bitcast(b.gep(w_row, [place]), I8.as_pointer()), _AHEAD_BYTES)
            add(place, lambda base, kind: load(b, base, ir.Constant(I64, 0), vector(kind, _LANES)))
        rest = b.urem(columns, ir.Constant(I64, _LANES))
        with b.if_then(b.icmp_unsigned("!=", rest, ir.Constant(I64, 0))):
            add(b.sub(columns, rest), lambda base, kind: at.load_first(b, base, rest, vector(kind, _LANES)))
        for number, sums in zip(height, totals, strict=True):
            for token, total in zip(count, sums, strict=True):
                b.store(at.sum_of(b, b.load(total)), b.gep(row(out, token, stride), [ir.Constant(I64, number)]))
        return context.get_dummy_value()

    return signature, generate


def _compile(kind: int) -> Any:
    """The product of a matrix of KINDS[kind], compiled when first called and kept on disk.

    Rows `first` to `last` of the matrix (rows, columns) times float32 x (tokens, columns), to float32 out (tokens,
    stride). All arguments are integers, pointers included.
    """
    size = _SIZES[kind]

    def product(weights, x, out, first, last, columns, tokens, stride):
        top = first
        while top < last:
            rows = _ROWS if last - top >= _ROWS else 1
            token = 0
            while token < tokens:
                left = tokens - token
                w, xs, place = weights + top * columns * size, x + token * columns * 4, out + (token * stride + top) * 4
                if rows == 1:
                    _tile(kind, 1, 1, w, xs, place, columns, stride)
                    token += 1
                elif left >= 4:
                    _tile(kind, _HALF, 4, w, xs, place, columns, stride)
                    _tile(kind, _HALF, 4, w + _HALF * columns * size, xs, place + _HALF * 4, columns, stride)
                    token += 4
                elif left >= 2:
                    _tile(kind, _ROWS, 2, w, xs, place, columns, stride)
                    token += 2
                else:
                    _tile(kind, _ROWS, 1, w, xs, place, columns, stride)
                    token += 1
            top += rows

    return compiled(product, kind)


_product_0, _product_1, _product_2 = _PRODUCTS = tuple(_compile(kind) for kind in range(len(KINDS)))


@njit(cache=True, nogil=True)
def multiply(kind, weights, x, out, first, last, columns, tokens, stride):
    if kind == 0:
        _product_0(weights, x, out, first, last, columns, tokens, stride)
    elif kind == 1:
        _product_1(weights, x, out, first, last, columns, tokens, stride)
    else:
        _product_2(weights, x, out, first, last, columns, tokens, stride)


# One for all kinds: numba's cache does not tell closures apart that differ in a compiled function alone.
@njit(cache=True, nogil=True, parallel=True)
def _by_threads(threads, kind, weights, x, out, rows, columns, tokens, stride):
    for part in prange(threads):
        first, last = rows * part // threads, rows * (part + 1) // threads
        multiply(kind, weights, x, out, first, last, columns, tokens, stride)


def product(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """weight (rows, columns), contiguous and of KINDS, times x (tokens, columns): float32 (tokens, rows)."""
    rows, columns = weight.shape
    kind, wide = KINDS.index(weight.dtype), x.float().contiguous()
    out = torch.empty(len(wide), rows)
    addresses = weight.data_ptr(), wide.data_ptr(), out.data_ptr()
    threads = torch.get_num_threads()
    if threads == 1:
        _PRODUCTS[kind](*addresses, 0, rows, columns, len(wide), rows)
    else:
        set_num_threads(min(threads, config.NUMBA_NUM_THREADS))
        _by_threads(threads, kind, *addresses, rows, columns, len(wide), rows)
    return out

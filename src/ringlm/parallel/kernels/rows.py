"""What comes before products, by rows: norms, the gate of an MLP, and rounding to 8 bits. float32; all arguments are
numbers, addresses included."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

from ringlm.parallel.kernels import instructions as at
from ringlm.parallel.kernels.instructions import F32, I8, I32, I64, LANES, constant, load, spread, vector

BLOCK: Final = 32  # columns that share a scale
FAST: Final = {"reassoc", "nsz", "contract"}  # sums in any order; infinities and NaN keep their meaning
_GELU: Final = 2 * math.sqrt(2 / math.pi)  # (1 + tanh(x)) / 2 is 1 / (1 + exp(-2 x))
_LOG2_E: Final = 1 / math.log(2)
_LN2_HIGH: Final = 0.693359375  # few bits, so that a product with a small integer is exact
_LN2_LOW: Final = math.log(2) - _LN2_HIGH


@intrinsic
def floats(typing, address):
    """An address as a pointer to float32."""
    return types.CPointer(types.float32)(address), lambda context, b, signature, values: b.inttoptr(
        values[0], F32.as_pointer()
    )


@intrinsic
def words(typing, address):
    """An address as a pointer to int64."""
    return types.CPointer(types.int64)(address), lambda context, b, signature, values: b.inttoptr(
        values[0], I64.as_pointer()
    )


@intrinsic
def exp_lanes(typing, address):
    """exp of the LANES floats at `address`, in place: to some 2 units in the last place; 0 below -87."""

    def generate(context: Any, b: at.Builder, signature: Any, arguments: Any) -> at.Value:
        place = b.inttoptr(arguments[0], vector(F32).as_pointer())
        x = b.load(place)
        x.align = 4
        tiny = b.fcmp_ordered("<", x, constant(F32, -87.0))
        x = b.select(b.fcmp_ordered(">", x, constant(F32, 88.0)), constant(F32, 88.0), x)  # NaN stays
        n = at.call(b, f"llvm.rint.v{LANES}f32", vector(F32), b.fmul(x, constant(F32, _LOG2_E)))
        rest = at.multiply_add(b, n, constant(F32, -_LN2_HIGH), x)
        rest = at.multiply_add(b, n, constant(F32, -_LN2_LOW), rest)
        power = constant(F32, 1 / 5040)
        for factorial in (720, 120, 24, 6, 2, 1, 1):  # Taylor; |rest| <= ln(2) / 2
            power = at.multiply_add(b, power, rest, constant(F32, 1 / factorial))
        exponent = b.shl(b.add(b.fptosi(n, vector(I32)), constant(I32, 127)), constant(I32, 23))
        result = b.fmul(power, b.bitcast(exponent, vector(F32)))
        b.store(b.select(tiny, constant(F32, 0.0), result), place).align = 4
        return context.get_dummy_value()

    return types.void(address), generate


@njit(cache=True, nogil=True, fastmath=FAST)
def _norm_factor(row, size, eps):
    total = np.float32(0)
    for column in range(size):
        total += row[column] * row[column]
    return np.float32(1) / np.sqrt(total / np.float32(size) + np.float32(eps))


@njit(cache=True, nogil=True, fastmath=FAST)
def rms_norm(x, weight, rows, size, eps, out):
    """out = x / sqrt(mean(x ** 2) + eps) * weight for `rows` rows of `size`."""
    values, scaled = carray(floats(x), (rows, size)), carray(floats(out), (rows, size))
    weights = carray(floats(weight), (size,))
    for row in range(rows):
        factor = _norm_factor(values[row], size, eps)
        for column in range(size):
            scaled[row, column] = values[row, column] * factor * weights[column]


@njit(cache=True, nogil=True, fastmath=FAST)
def add_rms_norm(x, weight, rows, size, eps, out):
    """out += x / sqrt(mean(x ** 2) + eps) * weight for `rows` rows of `size`."""
    values, total = carray(floats(x), (rows, size)), carray(floats(out), (rows, size))
    weights = carray(floats(weight), (size,))
    for row in range(rows):
        factor = _norm_factor(values[row], size, eps)
        for column in range(size):
            total[row, column] += values[row, column] * factor * weights[column]


@njit(cache=True, nogil=True)
def norm_heads(qkv, stride, tokens, queries, query_heads, keys, kv_heads, size, eps):
    """The norms with the weights `queries` and `keys` of each token's first `query_heads` and next `kv_heads` heads of
    `size`, each for itself, in place; `stride` elements from one token's heads to the next's."""
    for token in range(tokens):
        head = qkv + token * stride * 4
        rms_norm(head, queries, query_heads, size, eps, head)
        head += query_heads * size * 4
        rms_norm(head, keys, kv_heads, size, eps, head)


@njit(cache=True, nogil=True, fastmath=FAST)
def gate_multiply(gate_up, rows, size, stride, gelu, out):
    """out = gate / (1 + exp(-u)) * up for rows of `size` gates and as many ups, `stride` apart: u is the gate itself
    (silu), or what makes this GELU by tanh."""
    source, result = carray(floats(gate_up), (rows, stride)), carray(floats(out), (rows, size))
    whole = size // LANES * LANES
    for row in range(rows):
        if gelu:
            for column in range(size):
                gate = source[row, column]
                result[row, column] = np.float32(-_GELU) * gate * (np.float32(1) + np.float32(0.044715) * gate * gate)
        else:
            for column in range(size):
                result[row, column] = -source[row, column]
        for column in range(0, whole, LANES):
            exp_lanes(out + (row * size + column) * 4)
        for column in range(whole, size):
            result[row, column] = np.float32(math.exp(result[row, column]))
        for column in range(size):
            gate, up = source[row, column], source[row, size + column]
            result[row, column] = gate * up / (np.float32(1) + result[row, column])


@intrinsic
def _round_block(typing, x, codes, scale_at, sum_at):
    """32 floats at `x` to int8 at `codes`; their scale, and scale * sum(codes). All arguments are addresses."""
    signature = types.void(*[types.intp] * 4)

    def generate(context: Any, b: at.Builder, signature: Any, arguments: Any) -> at.Value:
        kinds = (F32, I8, F32, F32)
        x, codes, scale_at, sum_at = (
            b.inttoptr(value, kind.as_pointer()) for value, kind in zip(arguments, kinds, strict=True)
        )
        quarters = [load(b, x, ir.Constant(I64, first), vector(F32)) for first in range(0, BLOCK, LANES)]
        peaks = [at.call(b, "llvm.fabs.v8f32", vector(F32), quarter) for quarter in quarters]
        while len(peaks) > 1:
            peaks = [at.call(b, "llvm.maxnum.v8f32", vector(F32), *peaks[:2]), *peaks[2:]]
        peak = at.call(b, "llvm.vector.reduce.fmax.v8f32", F32, peaks[0])
        empty = b.fcmp_unordered("<=", peak, ir.Constant(F32, 0.0))
        inverse = b.select(empty, ir.Constant(F32, 0.0), b.fdiv(ir.Constant(F32, 127.0), peak))
        scale = b.fmul(peak, ir.Constant(F32, 1 / 127))
        total = constant(at.I32, 0)
        for index, quarter in enumerate(quarters):
            exact = b.fmul(quarter, spread(b, inverse))
            rounded = b.fptosi(at.call(b, "llvm.rint.v8f32", vector(F32), exact), vector(at.I32))
            total = b.add(total, rounded)
            place = b.bitcast(b.gep(codes, [ir.Constant(I64, index * LANES)]), vector(I8).as_pointer())
            b.store(b.trunc(rounded, vector(I8)), place).align = 1
        count = b.sitofp(at.call(b, "llvm.vector.reduce.add.v8i32", at.I32, total), F32)
        b.store(scale, scale_at)
        b.store(b.fmul(scale, count), sum_at)
        return context.get_dummy_value()

    return signature, generate


@njit(cache=True, nogil=True)
def round_activations(x, tokens, columns, lead, blocks, codes, scales, sums):
    """float32 x (tokens, columns) to int8 codes (tokens, blocks * 32), their scales and scale * sum(codes), float32
    (tokens, blocks). `lead` columns of the first block lie before x; they, and what is missing at the end, are 0.
    All arguments are integers, addresses included."""
    values = carray(floats(x), (tokens, columns))
    padded = np.zeros(BLOCK, np.float32)
    for token in range(tokens):
        for block in range(blocks):
            start = block * BLOCK - lead
            place = token * blocks + block
            piece = x + (token * columns + start) * 4
            if start < 0 or start + BLOCK > columns:
                for offset in range(BLOCK):
                    column = start + offset
                    padded[offset] = values[token, column] if 0 <= column < columns else np.float32(0)
                piece = padded.ctypes.data
            _round_block(piece, codes + place * BLOCK, scales + place * 4, sums + place * 4)

"""What lies between the products of a decode step, compiled for this CPU by numba: norms, the gate of an MLP, and
attention of one new token. float32; all arguments are numbers, addresses included. Knows no tensors.

torch takes 90 to 210 us a layer for these few thousand operations, these take 10 to 70 (docs/performance.md).
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
from numba import carray, njit, types
from numba.extending import intrinsic

from ringlm.parallel.kernels import instructions as at
from ringlm.parallel.kernels.instructions import F32, I32, LANES, constant, vector

_FAST: Final = {"reassoc", "nsz", "contract"}  # sums in any order; infinities and NaN keep their meaning
_LOG2_E: Final = 1 / math.log(2)
_LN2_HIGH: Final = 0.693359375  # few bits, so that a product with a small integer is exact
_LN2_LOW: Final = math.log(2) - _LN2_HIGH


@intrinsic
def _floats(typing, address):
    """An address as a pointer to float32."""
    return types.CPointer(types.float32)(address), lambda context, b, signature, values: b.inttoptr(
        values[0], F32.as_pointer()
    )


@intrinsic
def _exp_lanes(typing, address):
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


@njit(cache=True, nogil=True, fastmath=_FAST)
def rms_norm(x, weight, rows, size, eps, out):
    """out = x / sqrt(mean(x ** 2) + eps) * weight for `rows` rows of `size`."""
    values, scaled = carray(_floats(x), (rows, size)), carray(_floats(out), (rows, size))
    weights = carray(_floats(weight), (size,))
    for row in range(rows):
        total = np.float32(0)
        for column in range(size):
            total += values[row, column] * values[row, column]
        factor = np.float32(1) / np.sqrt(total / np.float32(size) + np.float32(eps))
        for column in range(size):
            scaled[row, column] = values[row, column] * factor * weights[column]


@njit(cache=True, nogil=True, fastmath=_FAST)
def silu_multiply(gate_up, rows, size, stride, out):
    """out = gate / (1 + exp(-gate)) * up for rows of `size` gates and as many ups, `stride` apart."""
    source, result = carray(_floats(gate_up), (rows, stride)), carray(_floats(out), (rows, size))
    whole = size // LANES * LANES
    for row in range(rows):
        for column in range(size):
            result[row, column] = -source[row, column]
        for column in range(0, whole, LANES):
            _exp_lanes(out + (row * size + column) * 4)
        for column in range(whole, size):
            result[row, column] = np.float32(math.exp(result[row, column]))
        for column in range(size):
            gate, up = source[row, column], source[row, size + column]
            result[row, column] = gate * up / (np.float32(1) + result[row, column])


@njit(cache=True, nogil=True, fastmath=_FAST)
def attend(qkv, cos, sin, keys, values, query_heads, kv_heads, size, context, position, scale, scores, out):
    """Attention of one token at `position`, which sees all before it and itself.

    qkv (query_heads + 2 * kv_heads, size) is overwritten; cos and sin (size,) turn queries and keys by rotate-half,
    the sign in the sine. keys and values (kv_heads, context, size) get the token's own. scores is room for
    (query_heads / kv_heads) * (position + 8) floats. out (query_heads, size).
    """
    half, group, length = size // 2, query_heads // kv_heads, position + 1
    heads = carray(_floats(qkv), (query_heads + 2 * kv_heads, size))
    cosines, sines = carray(_floats(cos), (size,)), carray(_floats(sin), (size,))
    past_keys = carray(_floats(keys), (kv_heads, context, size))
    past_values = carray(_floats(values), (kv_heads, context, size))
    result = carray(_floats(out), (query_heads, size))
    padded = (length + LANES - 1) // LANES * LANES
    weights = carray(_floats(scores), (group, padded))
    for head in range(query_heads + kv_heads):
        for place in range(half):
            low, high = heads[head, place], heads[head, place + half]
            heads[head, place] = low * cosines[place] + high * sines[place]
            heads[head, place + half] = high * cosines[place + half] + low * sines[place + half]
    for head in range(kv_heads):
        for place in range(size):
            past_keys[head, position, place] = heads[query_heads + head, place]
            past_values[head, position, place] = heads[query_heads + kv_heads + head, place]
    for head in range(kv_heads):
        for at_position in range(length):
            key = past_keys[head, at_position]
            for member in range(group):
                query = heads[head * group + member]
                total = np.float32(0)
                for place in range(size):
                    total += query[place] * key[place]
                weights[member, at_position] = total * np.float32(scale)
        for member in range(group):
            mine, place_out = weights[member], result[head * group + member]
            peak = mine[0]
            for at_position in range(1, length):
                peak = max(peak, mine[at_position])
            for at_position in range(length):
                mine[at_position] -= peak
            for at_position in range(length, padded):
                mine[at_position] = np.float32(-100)
            total = np.float32(0)
            for first in range(0, padded, LANES):
                _exp_lanes(scores + (member * padded + first) * 4)
            for at_position in range(length):
                total += mine[at_position]
            for at_position in range(length):
                mine[at_position] /= total
            for place in range(size):
                place_out[place] = np.float32(0)
        for at_position in range(length):
            value = past_values[head, at_position]
            for member in range(group):
                weight = weights[member, at_position]
                place_out = result[head * group + member]
                for place in range(size):
                    place_out[place] += weight * value[place]

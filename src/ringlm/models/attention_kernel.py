"""Attention of one new token in float32, compiled for this CPU by numba. All arguments are numbers, addresses included.

torch takes 45 to 160 us for what this does in 6 to 55 (docs/performance.md).
"""

from __future__ import annotations

import numpy as np
from numba import carray, njit

from ringlm.parallel.kernels.instructions import LANES
from ringlm.parallel.kernels.rows import FAST, exp_lanes, floats


@njit(cache=True, nogil=True, fastmath=FAST)
def attend(
    qkv, cos, sin, keys, values, query_heads, kv_heads, size, rotary, context, position, window, scale, soft_cap,
    scores, out,
):  # fmt: skip
    """Attention of one token at `position`, which sees the last `window` positions up to its own.

    qkv (query_heads + 2 * kv_heads, size) is overwritten; cos and sin (rotary,) turn the first `rotary` places of
    queries and keys by rotate-half, the sign in the sine. keys and values (kv_heads, context, size) get the token's
    own. Where `soft_cap` is not 0, scores become soft_cap * tanh(score / soft_cap). scores is room for
    (query_heads / kv_heads) * (position + 8) floats. out (query_heads, size).
    """
    half, group, length = rotary // 2, query_heads // kv_heads, min(position + 1, window)
    start = position + 1 - length
    heads = carray(floats(qkv), (query_heads + 2 * kv_heads, size))
    cosines, sines = carray(floats(cos), (rotary,)), carray(floats(sin), (rotary,))
    past_keys = carray(floats(keys), (kv_heads, context, size))
    past_values = carray(floats(values), (kv_heads, context, size))
    result = carray(floats(out), (query_heads, size))
    padded = (length + LANES - 1) // LANES * LANES
    weights = carray(floats(scores), (group, padded))
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
            key = past_keys[head, start + at_position]
            for member in range(group):
                query = heads[head * group + member]
                total = np.float32(0)
                for place in range(size):
                    total += query[place] * key[place]
                weights[member, at_position] = total * np.float32(scale)
        for member in range(group):
            mine, place_out = weights[member], result[head * group + member]
            if soft_cap > 0:
                for at_position in range(length):
                    mine[at_position] *= np.float32(2 / soft_cap)
                for first in range(0, padded, LANES):
                    exp_lanes(scores + (member * padded + first) * 4)
                for at_position in range(length):  # tanh(x) = 1 - 2 / (exp(2 x) + 1)
                    mine[at_position] = np.float32(soft_cap) - np.float32(2 * soft_cap) / (mine[at_position] + 1)
            peak = mine[0]
            for at_position in range(1, length):
                peak = max(peak, mine[at_position])
            for at_position in range(length):
                mine[at_position] -= peak
            for at_position in range(length, padded):
                mine[at_position] = np.float32(-100)
            total = np.float32(0)
            for first in range(0, padded, LANES):
                exp_lanes(scores + (member * padded + first) * 4)
            for at_position in range(length):
                total += mine[at_position]
            for at_position in range(length):
                mine[at_position] /= total
            for place in range(size):
                place_out[place] = np.float32(0)
        for at_position in range(length):
            value = past_values[head, start + at_position]
            for member in range(group):
                weight = weights[member, at_position]
                place_out = result[head * group + member]
                for place in range(size):
                    place_out[place] += weight * value[place]

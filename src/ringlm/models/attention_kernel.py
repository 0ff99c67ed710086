"""Attention of one new token of each of several sequences, compiled for this CPU by numba, in float32 and bfloat16. All
arguments are numbers, addresses included; `like` tells the type of what lies there: a float32, or a uint16 that holds
a bfloat16's bits.

torch takes 40 to 160 us a sequence for what this does in 6 to 65 (docs/performance.md).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

from ringlm.parallel.kernels.instructions import F32, I16, I32, LANES, Builder, Value
from ringlm.parallel.kernels.rows import FAST, exp_lanes, floats, words


@intrinsic
def elements(typing, address, like):
    """An address as a pointer to elements of the type of `like`."""
    kind = F32 if like == types.float32 else I16
    return types.CPointer(like)(address, like), lambda context, b, signature, values: b.inttoptr(
        values[0], kind.as_pointer()
    )


@intrinsic
def widen(typing, value):
    """The float32 that an element stands for."""

    def generate(context: Any, b: Builder, signature: Any, arguments: Any) -> Value:
        if value == types.float32:
            return arguments[0]
        return b.bitcast(b.shl(b.zext(arguments[0], I32), ir.Constant(I32, 16)), F32)

    return types.float32(value), generate


@intrinsic
def narrow(typing, value, like):
    """The element nearest to a float32, of equals the even one."""

    def generate(context: Any, b: Builder, signature: Any, arguments: Any) -> Value:
        if like == types.float32:
            return arguments[0]
        bits = b.bitcast(arguments[0], I32)
        odd = b.and_(b.lshr(bits, ir.Constant(I32, 16)), ir.Constant(I32, 1))
        rounded = b.add(b.add(bits, odd), ir.Constant(I32, 0x7FFF))
        unordered = b.fcmp_unordered("uno", arguments[0], arguments[0])
        return b.trunc(b.lshr(b.select(unordered, ir.Constant(I32, 0x7FC00000), rounded), ir.Constant(I32, 16)), I16)

    return like(value, like), generate


@njit(cache=True, nogil=True, fastmath=FAST)
def attend(
    qkv, rows, stride, cos, sin, context, rotary, keys, values, tokens, count, runs, query_heads, kv_heads, size,
    positions, window, scale, soft_cap, scratch, out, like,
):  # fmt: skip
    """Attention of `count` tokens, each of which sees the last `window` positions up to its own.

    qkv (rows, stride) begins each row with (query_heads + 2 * kv_heads, size); cos and sin (context, rotary) turn
    the first `rotary` places of queries and keys by rotate-half, the sign in the sine. keys and values (kv_heads,
    positions, size) get the tokens' own. `tokens` is int64 (count, 4): row, position, index of the first of the
    sequence's runs, their number; `runs` int64 (all, 2): place of a run's first position in keys and values, and
    count. Where `soft_cap` is not 0, scores become soft_cap * tanh(score / soft_cap). scratch is room for
    2 * (query_heads + kv_heads) * size + query_heads / kv_heads * (largest position + 8) floats. out (rows,
    query_heads, size).
    """
    table, all_runs = carray(words(tokens), (count, 4)), carray(words(runs), (count, 2))
    source, result = carray(elements(qkv, like), (rows, stride)), carray(elements(out, like), (rows, query_heads, size))
    cosines, sines = carray(elements(cos, like), (context, rotary)), carray(elements(sin, like), (context, rotary))
    past_keys = carray(elements(keys, like), (kv_heads, positions, size))
    past_values = carray(elements(values, like), (kv_heads, positions, size))
    heads = carray(floats(scratch), (query_heads + 2 * kv_heads, size))
    mixed = carray(floats(scratch + (query_heads + 2 * kv_heads) * size * 4), (query_heads, size))
    scores = scratch + 2 * (query_heads + kv_heads) * size * 4
    half, group = rotary // 2, query_heads // kv_heads
    for token in range(count):
        row, position, first_run, last_run = table[token, 0], table[token, 1], table[token, 2], table[token, 3]
        last_run += first_run
        length = min(position + 1, window)
        start = position + 1 - length
        padded = (length + LANES - 1) // LANES * LANES
        weights = carray(floats(scores), (group, padded))
        for head in range(query_heads + 2 * kv_heads):
            for place in range(size):
                heads[head, place] = widen(source[row, head * size + place])
        for head in range(query_heads + kv_heads):
            for place in range(half):
                low, high = heads[head, place], heads[head, place + half]
                heads[head, place] = low * widen(cosines[position, place]) + high * widen(sines[position, place])
                heads[head, place + half] = high * widen(cosines[position, place + half]) + low * widen(
                    sines[position, place + half]
                )
        own = all_runs[last_run - 1, 0] + all_runs[last_run - 1, 1] - 1
        for head in range(kv_heads):
            for place in range(size):
                past_keys[head, own, place] = narrow(heads[query_heads + head, place], like)
                past_values[head, own, place] = narrow(heads[query_heads + kv_heads + head, place], like)
        for head in range(kv_heads):
            begin = 0
            for run in range(first_run, last_run):
                shift = all_runs[run, 0] - begin
                for seen in range(max(start, begin), begin + all_runs[run, 1]):
                    key = past_keys[head, seen + shift]
                    for member in range(group):
                        query = heads[head * group + member]
                        total = np.float32(0)
                        for place in range(size):
                            total += query[place] * widen(key[place])
                        weights[member, seen - start] = total * np.float32(scale)
                begin += all_runs[run, 1]
            for member in range(group):
                _softmax(scores + member * padded * 4, length, padded, soft_cap)
                for place in range(size):
                    mixed[head * group + member, place] = np.float32(0)
            begin = 0
            for run in range(first_run, last_run):
                shift = all_runs[run, 0] - begin
                for seen in range(max(start, begin), begin + all_runs[run, 1]):
                    value = past_values[head, seen + shift]
                    for member in range(group):
                        weight = weights[member, seen - start]
                        total_of = mixed[head * group + member]
                        for place in range(size):
                            total_of[place] += weight * widen(value[place])
                begin += all_runs[run, 1]
        for head in range(query_heads):
            for place in range(size):
                result[row, head, place] = narrow(mixed[head, place], like)


@njit(cache=True, nogil=True, fastmath=FAST)
def _softmax(scores, length, padded, soft_cap):
    """The softmax of `length` capped scores, in place; what follows up to `padded` is overwritten."""
    mine = carray(floats(scores), (padded,))
    if soft_cap > 0:
        for seen in range(length):
            mine[seen] *= np.float32(2 / soft_cap)
        for first in range(0, padded, LANES):
            exp_lanes(scores + first * 4)
        for seen in range(length):  # tanh(x) = 1 - 2 / (exp(2 x) + 1)
            mine[seen] = np.float32(soft_cap) - np.float32(2 * soft_cap) / (mine[seen] + 1)
    peak = mine[0]
    for seen in range(1, length):
        peak = max(peak, mine[seen])
    for seen in range(length):
        mine[seen] -= peak
    for seen in range(length, padded):
        mine[seen] = np.float32(-100)
    total = np.float32(0)
    for first in range(0, padded, LANES):
        exp_lanes(scores + first * 4)
    for seen in range(length):
        total += mine[seen]
    for seen in range(length):
        mine[seen] /= total

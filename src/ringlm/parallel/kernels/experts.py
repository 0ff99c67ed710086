"""A few tokens through their experts, all in one call: the products of kernels/products.py, expert after expert. All
arguments are numbers, addresses included.

A route is a token's way through one expert; routes are sorted by expert, so that an expert's activations lie together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from numba import carray, config, njit, prange, set_num_threads

from ringlm.parallel.kernels.products import GELU_GATE, HEAD_WORDS, SEGMENT_WORDS, multiply
from ringlm.parallel.kernels.rows import BLOCK, FAST, floats, gate_multiply, round_activations, words
from ringlm.parallel.kernels.variants import compiled

_WORD: Final = 8  # bytes


def route_bytes(gate_up: Sequence[int], down: Sequence[int]) -> int:
    """What `mix` needs to work in for each route, by the words of an expert's two plans."""
    rounded = sum(plan[3] * (BLOCK + 8) for plan in (gate_up, down))
    return _WORD + rounded + 4 * (gate_up[4] + down[1] + down[4])


@njit(cache=True, nogil=True)
def _sort(chosen, routes, experts, order, starts):
    """The routes by expert, and where those of each expert begin."""
    choices, by_expert = carray(words(chosen), (routes,)), carray(words(order), (routes,))
    first = carray(words(starts), (experts + 1,))
    first[:] = 0
    for route in range(routes):
        first[choices[route]] += 1
    for expert in range(1, experts + 1):
        first[expert] += first[expert - 1]
    for route in range(routes - 1, -1, -1):
        first[choices[route]] -= 1
        by_expert[first[choices[route]]] = route


@njit(cache=True, nogil=True)
def _products(which, segment, top, part, parts, plans, experts, starts, codes, scales, sums, shared, out):
    """One part of the rows of segment `segment` of each expert's matrix `which`, times its routes' activations, or the
    one row that all of them share."""
    addresses, first = carray(words(plans), (experts, 2)), carray(words(starts), (experts + 1,))
    for expert in range(experts):
        start, count = first[expert], first[expert + 1] - first[expert]
        if count:
            plan = addresses[expert, which]
            head = carray(words(plan), (HEAD_WORDS,))
            p = carray(words(plan + (HEAD_WORDS + segment * SEGMENT_WORDS) * 8), (SEGMENT_WORDS,))
            blocks, stride = head[3], head[4]
            row = 0 if shared else start
            xc, xs, xt = codes + row * blocks * BLOCK, scales + row * blocks * 4, sums + row * blocks * 4
            begin, end = p[5] * part // parts, p[5] * (part + 1) // parts
            place = out + (start * stride + top) * 4
            multiply(p[0], p[1], p[2], p[3], xc, xs, xt, place, begin, end, blocks, count, stride)


@njit(cache=True, nogil=True, fastmath=FAST)
def _add(weights, order, routes, chosen, size, results, stride, out):
    """Each token's results, weighted, in the order of its experts."""
    factors, by_expert = carray(floats(weights), (routes,)), carray(words(order), (routes,))
    found, total = carray(floats(results), (routes, stride)), carray(floats(out), (routes // chosen, size))
    total[:] = 0
    for place in range(routes):
        route = by_expert[place]
        token, factor = route // chosen, factors[route]
        for column in range(size):
            total[token, column] += factor * found[place, column]


def _compile(parallel: bool) -> Any:
    def mix(threads, plans, experts, x, tokens, chosen, weights, choices, work, out):
        parts = threads if parallel else 1
        routes = tokens * chosen
        first = carray(words(plans), (2,))
        up, down = carray(words(first[0]), (HEAD_WORDS,)), carray(words(first[1]), (HEAD_WORDS,))
        size, columns = up[1], down[1]
        order = work
        starts = order + routes * 8
        up_out = starts + (experts + 1) * 8
        gated = up_out + routes * up[4] * 4
        down_out = gated + routes * columns * 4
        x_scales = down_out + routes * down[4] * 4
        x_sums = x_scales + routes * up[3] * 4
        x_codes = x_sums + routes * up[3] * 4
        h_scales = x_codes + routes * up[3] * BLOCK
        h_sums = h_scales + routes * down[3] * 4
        h_codes = h_sums + routes * down[3] * 4

        _sort(choices, routes, experts, order, starts)
        by_expert = carray(words(order), (routes,))
        alone = tokens == 1  # then all routes have the same activations, to be rounded once
        for place in range(1 if alone else routes):
            row, block = x + by_expert[place] // chosen * size * 4, place * up[3]
            round_activations(
                row, 1, size, up[2], up[3], x_codes + block * BLOCK, x_scales + block * 4, x_sums + block * 4
            )
        rounded = x_codes, x_scales, x_sums
        top = 0
        for segment in range(up[6]):
            for part in prange(parts):
                _products(0, segment, top, part, parts, plans, experts, starts, *rounded, alone, up_out)
            top += carray(words(first[0] + (HEAD_WORDS + segment * SEGMENT_WORDS) * 8), (SEGMENT_WORDS,))[4]
        gate_multiply(up_out, routes, columns, up[4], down[0] == GELU_GATE, gated)
        round_activations(gated, routes, columns, down[2], down[3], h_codes, h_scales, h_sums)
        for part in prange(parts):  # a matrix of one part is one segment
            _products(1, 0, 0, part, parts, plans, experts, starts, h_codes, h_scales, h_sums, False, down_out)
        _add(weights, order, routes, chosen, size, down_out, down[4], out)

    return compiled(mix, "by_threads" if parallel else "alone", parallel=parallel)


_mix, _mix_by_threads = _compile(False), _compile(True)


def mix(
    threads: int, plans: int, experts: int, x: int, tokens: int, chosen: int, weights: int, choices: int, work: int,
    out: int,
) -> None:  # fmt: skip
    """To `out`, float32 (tokens, size), each token's `chosen` experts' results times their `weights`, float32 (tokens,
    chosen), added up. `choices` int64 (tokens, chosen), all within `experts`; `plans` int64 (experts, 2): addresses of
    the words that describe gate and up, and down; x float32 (tokens, size). `work` has room for `route_bytes` a route
    and a word an expert and one more."""
    if threads == 1:
        _mix(1, plans, experts, x, tokens, chosen, weights, choices, work, out)
    else:
        set_num_threads(min(threads, config.NUMBA_NUM_THREADS))
        _mix_by_threads(threads, plans, experts, x, tokens, chosen, weights, choices, work, out)

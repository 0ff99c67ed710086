"""Where a few tokens go, in one call: their norm, the router's scores, and the experts that it gives the most weight.
float32; all arguments are numbers, addresses included.

By torch a token's way to its experts takes as long as reading a fifth of them (docs/performance.md).
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numba import carray, njit

from ringlm.parallel.kernels.dense import multiply
from ringlm.parallel.kernels.rows import FAST, floats, rms_norm, words

_WORD: Final = 8  # bytes
_ROUTER_WORDS: Final = 7


@njit(cache=True, nogil=True, fastmath=FAST)
def choose(scores, experts, chosen, normalized, weights, choices):
    """The `chosen` largest of the softmax of `experts` scores, which this overwrites; of equal ones the first. With
    `normalized` those sum to 1."""
    given = carray(floats(scores), (experts,))
    factors, found = carray(floats(weights), (chosen,)), carray(words(choices), (chosen,))
    total = np.float32(0)
    if not normalized:
        peak = given[0]
        for expert in range(1, experts):
            peak = max(peak, given[expert])
        for expert in range(experts):
            total += np.float32(math.exp(given[expert] - peak))
    for place in range(chosen):
        best = 0
        for expert in range(1, experts):
            if given[expert] > given[best]:
                best = expert
        found[place] = best
        factors[place] = given[best]
        given[best] = -np.inf
    peak = factors[0]
    for place in range(chosen):
        factors[place] = np.float32(math.exp(factors[place] - peak))
        if normalized:
            total += factors[place]
    for place in range(chosen):
        factors[place] /= total


def routing_bytes(tokens: int, size: int, experts: int, chosen: int) -> int:
    """What `route` needs for its results, and to work in."""
    return tokens * (4 * size + 4 * experts + 12 * chosen) + _WORD


@njit(cache=True, nogil=True)
def route(router, eps, x, tokens, work):
    """The addresses of x (tokens, size) normed, of each token's weights, float32 (tokens, chosen), and experts, int64
    (tokens, chosen), and of what is left of `work`, which has room for `routing_bytes` and begins with them.

    `router` has int64 words: the number of experts, how many are chosen, whether their weights are to sum to 1, size,
    the norm's weight, and the kind (of kernels/dense.py) and address of the router's matrix."""
    r = carray(words(router), (_ROUTER_WORDS,))
    experts, chosen, size = r[0], r[1], r[3]
    choices = work
    normed = choices + tokens * chosen * 8
    weights = normed + tokens * size * 4
    scores = weights + tokens * chosen * 4
    rms_norm(x, r[4], tokens, size, eps, normed)
    multiply(r[5], r[6], normed, scores, 0, experts, size, tokens, experts)
    for token in range(tokens):
        first = token * chosen
        choose(scores + token * experts * 4, experts, chosen, r[2] != 0, weights + first * 4, choices + first * 8)
    rest = scores + tokens * experts * 4
    return normed, weights, choices, rest + -rest % _WORD

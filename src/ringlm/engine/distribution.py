"""From a row of logits and a number in [0, 1) to a token. Knows sampling parameters, no requests.

The steps and their order are transformers': temperature, top_k, top_p (Holtzman et al., "The Curious Case of Neural
Text Degeneration", 2020), min_p (Nguyen et al., "Turning Up the Heat", 2024), typical_p (Meister et al., "Locally
Typical Sampling", 2022), each on what those before it have left. Of equals the lower index stays.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ringlm.engine.logits import Floats, Indices, best, select
from ringlm.engine.request import SamplingParams

Weights = NDArray[np.float64]

_BLOCK = 256  # weights are summed by so many first: a cumulative sum of all takes half of the time of a draw


def draw(row: Floats, params: SamplingParams, u: float) -> int:
    """The index into `row` (V,) at which the distribution that `params` make of it passes `u` in [0, 1).

    `row` holds finite values and -inf, its best one finite.
    """
    kept, weights = distribution(row, params)
    index = _invert(weights, u)
    return index if kept is None else int(kept[index])


def distribution(row: Floats, params: SamplingParams) -> tuple[Indices | None, Weights]:
    """The indices into `row` (V,) that may be drawn, None for all, and their probabilities but for a common factor."""
    kept: Indices | None = None
    if params.top_k > 0:
        kept = best(row, params.top_k)
        row = row[kept]
    weights = _weigh(row, params.temperature)
    if params.top_p < 1.0:
        kept, weights = _keep(kept, weights, _nucleus(weights, params.top_p))
    if params.min_p > 0.0:
        kept, weights = _keep(kept, weights, np.flatnonzero(weights >= params.min_p * weights.max()))
    if params.typical_p < 1.0:
        kept, weights = _keep(kept, weights, _typical(weights, params.typical_p))
    return kept, weights


def _keep(kept: Indices | None, weights: Weights, found: Indices) -> tuple[Indices, Weights]:
    return found if kept is None else kept[found], weights[found]


def _weigh(row: Floats, temperature: float) -> Weights:
    """exp((value - best) / temperature): probabilities before division by their sum."""
    weights = row.astype(np.float64)
    weights -= row.max()
    if temperature != 1.0:
        with np.errstate(over="ignore"):  # a tiny temperature: -inf is right
            weights /= temperature
    return np.exp(weights, out=weights)


def _nucleus(weights: Weights, share: float) -> Indices:
    """The fewest indices whose weights make up `share` of the whole; at least one."""
    total = weights.sum()
    # Those that are smaller than this have less than 1 - share together. Sorting everything takes milliseconds.
    large = np.flatnonzero(weights >= (1.0 - share) * total / weights.size)
    passed = np.cumsum(np.sort(weights[large])[::-1])
    return large[select(weights[large], int(np.searchsorted(passed, share * total)) + 1)]


def _typical(weights: Weights, share: float) -> Indices:
    """The indices whose surprise is nearest to the expected one and whose weights make up `share` of the whole."""
    total = weights.sum()
    with np.errstate(divide="ignore", invalid="ignore"):  # a weight of 0: an infinite surprise, expected nowhere
        surprise = -np.log(weights / total)
        distance = np.abs(surprise - np.nansum(weights * surprise) / total)
    size = 256  # the set is seldom larger
    while True:
        near = np.argpartition(distance, size)[:size] if size < distance.size else np.arange(distance.size)
        near = near[np.argsort(distance[near])]
        last = int(np.searchsorted(np.cumsum(weights[near]), share * total))
        if last < near.size or near.size == distance.size:
            return np.flatnonzero(distance <= distance[near[min(last, near.size - 1)]])
        size *= 8


def _invert(weights: Weights, u: float) -> int:
    """The index at which the cumulative weights pass the share `u` of the whole; its weight is not 0."""
    passed = np.cumsum(np.add.reduceat(weights, np.arange(0, weights.size, _BLOCK)))
    target = _below(u * passed[-1], passed[-1])
    block = int(np.searchsorted(passed, target, side="right"))
    start = block * _BLOCK
    within = np.cumsum(weights[start : start + _BLOCK])
    rest = _below(target - (passed[block - 1] if block else 0.0), within[-1])
    return start + int(np.searchsorted(within, rest, side="right"))


def _below(target: float, total: float) -> float:
    """`target`, which rounding may have taken up to `total`."""
    return min(target, float(np.nextafter(total, 0.0)))

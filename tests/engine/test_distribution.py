"""What may be drawn and how often: beside a float64 reference, token by token, and transformers' processors."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as theirs

from ringlm.engine.distribution import distribution, draw
from ringlm.engine.randomness import uniform
from ringlm.engine.request import SamplingParams
from tests.engine.statistics import chi_square_bound


def expected(row: list[float], params: SamplingParams) -> dict[int, float]:
    """Token probabilities, worked out one token at a time."""
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))
    if params.top_k > 0:
        order = order[: params.top_k]
    weights = {i: math.exp((row[i] - max(row)) / params.temperature) for i in order}
    total, reached = sum(weights.values()), 0.0
    kept: dict[int, float] = {}
    for i in order:
        if kept and reached >= params.top_p * total:
            break
        kept[i] = weights[i]
        reached += weights[i]
    peak = max(kept.values())
    kept = {i: weight for i, weight in kept.items() if weight and weight >= params.min_p * peak}
    total = sum(kept.values())
    shares = {i: weight / total for i, weight in kept.items()}
    entropy = -sum(share * math.log(share) for share in shares.values())
    distances = {i: abs(-math.log(share) - entropy) for i, share in shares.items()}
    farthest = reached = 0.0
    typical: dict[int, float] = {}
    for i in sorted(shares, key=lambda i: distances[i]):
        if reached >= params.typical_p - 1e-12 and distances[i] > farthest + 1e-12:
            break
        typical[i], farthest = shares[i], distances[i]
        reached += shares[i]
    total = sum(typical.values())
    return {i: share / total for i, share in typical.items()}


ROW = [0.3, -1.0, 2.0, 1.0, -math.inf, 2.0, 0.0, -0.5, 1.5, 0.9]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 3},
    {"top_p": 0.8},
    {"min_p": 0.3},
    {"typical_p": 0.2},
    {"typical_p": 0.7},
    {"top_k": 5, "top_p": 0.7, "temperature": 2.0},
    {"top_k": 6, "min_p": 0.2, "temperature": 1.5},
    {"top_k": 7, "top_p": 0.95, "min_p": 0.15},
    {"top_k": 8, "top_p": 0.95, "min_p": 0.1, "typical_p": 0.8, "temperature": 1.3},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_draws_follow_the_distribution(settings: dict[str, Any]) -> None:
    params = SamplingParams(**settings)
    row = np.array(ROW, np.float32)
    draws = 4000
    seen = Counter(draw(row, params, uniform(1234, position)) for position in range(draws))
    probabilities = expected(ROW, params)
    assert set(seen) <= set(probabilities)
    chi_square = sum((seen[i] - draws * p) ** 2 / (draws * p) for i, p in probabilities.items())
    assert chi_square < chi_square_bound(max(1, len(probabilities) - 1))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("size", [10, 3000])
def test_probabilities_are_the_references_and_transformers(settings: dict[str, Any], size: int) -> None:
    """3,000 logits, so that sets are larger than what is looked at first."""
    params = SamplingParams(**settings)
    processors = theirs.LogitsProcessorList([theirs.TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        processors.append(theirs.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        processors.append(theirs.TopPLogitsWarper(params.top_p))
    if params.min_p:
        processors.append(theirs.MinPLogitsWarper(params.min_p))
    if params.typical_p < 1:
        processors.append(theirs.TypicalLogitsWarper(params.typical_p))
    for seed in range(5):
        row = (np.random.default_rng(seed).standard_normal(size) * 0.5).astype(np.float32)
        kept, weights = distribution(row, params)
        ours = np.zeros(size)
        ours[slice(None) if kept is None else kept] = weights / weights.sum()
        probabilities = expected(row.tolist(), params)
        assert set(np.flatnonzero(ours)) == set(probabilities)
        np.testing.assert_allclose(ours[list(probabilities)], list(probabilities.values()), rtol=1e-9)
        reference = processors(torch.tensor([[0]]), torch.from_numpy(row.astype(np.float64))[None])[0].softmax(0)
        np.testing.assert_allclose(ours, reference.numpy(), rtol=1e-9)


def test_what_top_p_keeps() -> None:
    """The smallest set that reaches p, its last token included; p reached exactly needs no more."""
    row = np.log(np.array([0.125, 0.5, 0.25, 0.125], np.float64)).astype(np.float32)

    def drawn(**settings: float) -> set[int]:
        params = SamplingParams(**settings)
        return {draw(row, params, u) for u in np.linspace(0.0, 1.0, 400, endpoint=False)}

    assert drawn(top_p=1e-9) == {1}
    assert drawn(top_p=0.49) == {1}
    assert drawn(top_p=0.51) == {1, 2}
    assert drawn(top_p=0.76) == {1, 2, 0}  # of the equal ones the lower id
    assert drawn(top_p=0.999) == {0, 1, 2, 3}
    assert drawn(top_k=2, top_p=0.66) == {1}  # of what top_k left, token 1 has two thirds
    assert drawn(top_k=2, top_p=0.67) == {1, 2}
    assert drawn(min_p=0.3) == {1, 2}
    assert drawn(min_p=1.0) == {1}
    equal = np.zeros(4, np.float32)
    assert {draw(equal, SamplingParams(top_p=0.5), u) for u in np.linspace(0, 0.999, 100)} == {0, 1}


def test_a_nucleus_larger_than_the_first_guess() -> None:
    """Flat logits over a large vocabulary: the same set as from sorting everything."""
    row = np.random.default_rng(0).standard_normal(5000).astype(np.float32)
    for top_p in (0.05, 0.3, 0.6, 0.9, 0.999):
        params = SamplingParams(top_p=top_p)
        order = np.argsort(-row, kind="stable")
        weights = np.exp(row[order].astype(np.float64))
        kept = order[: np.searchsorted(np.cumsum(weights), top_p * weights.sum()) + 1]
        drawn = {draw(row, params, u) for u in np.linspace(0.0, 1.0, 300, endpoint=False)}
        assert drawn <= set(kept.tolist())
        assert draw(row, params, 1.0 - 2.0**-53) == kept[-1]


@pytest.mark.parametrize("u", [0.0, 0.5, 1.0 - 2.0**-53])
def test_what_has_no_probability_is_never_drawn(u: float) -> None:
    row = np.array([-np.inf, -1e30, 0.0, -np.inf], np.float32)
    for temperature in (1e-300, 0.7, 100.0):
        for extra in ({}, {"top_k": 3}, {"top_p": 0.999999}, {"min_p": 1e-9}):
            assert draw(row, SamplingParams(temperature=temperature, **extra), u) == 2

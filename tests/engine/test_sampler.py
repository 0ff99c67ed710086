from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ringlm.engine.logits import merge, pick
from ringlm.engine.request import SamplingParams
from ringlm.engine.sampler import MAX_CANDIDATES, candidates, draw, sample
from ringlm.engine.sequence import Limits, Sequence, begin
from ringlm.errors import RequestError
from tests.engine.statistics import chi_square_bound

LIMITS = Limits(context=1 << 20, vocabulary=1000, eos_token_ids=frozenset())
GREEDY = SamplingParams(temperature=0.0)


def at_position(position: int, params: SamplingParams) -> Sequence:
    return begin(7, [0] * position, params, LIMITS)


def expected(row: list[float], params: SamplingParams) -> dict[int, float]:
    """Token probabilities, worked out one token at a time."""
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))
    if params.top_k > 0:
        order = order[: params.top_k]
    weights = {i: math.exp((row[i] - max(row)) / params.temperature) for i in order}
    total = sum(weights.values())
    kept: dict[int, float] = {}
    for i in order:
        if kept and sum(kept.values()) >= params.top_p * total:
            break
        kept[i] = weights[i]
    peak = max(kept.values())
    kept = {i: weight for i, weight in kept.items() if weight >= params.min_p * peak}
    total = sum(kept.values())
    return {i: weight / total for i, weight in kept.items() if weight}


ROW = [0.3, -1.0, 2.0, 1.0, -math.inf, 2.0, 0.0, -0.5, 1.5, 0.9]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 3},
        {"top_p": 0.8},
        {"min_p": 0.3},
        {"top_k": 5, "top_p": 0.7, "temperature": 2.0},
        {"top_k": 6, "min_p": 0.2, "temperature": 1.5},
        {"top_k": 7, "top_p": 0.95, "min_p": 0.15},
    ],
    ids=str,
)
def test_draws_follow_the_distribution(settings: dict[str, float]) -> None:
    params = SamplingParams(seed=1234, **settings)
    logits = np.array([ROW], np.float32)
    sequence = at_position(1, params)
    draws = 4000
    seen: Counter[int] = Counter()
    for _ in range(draws):
        (token,) = sample(logits, [sequence])
        assert isinstance(token, int)
        seen[token] += 1
        sequence.tokens.append(token)
    probabilities = expected(ROW, params)
    assert set(seen) <= set(probabilities)
    chi_square = sum((seen[i] - draws * p) ** 2 / (draws * p) for i, p in probabilities.items())
    assert chi_square < chi_square_bound(max(1, len(probabilities) - 1))


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


@settings(max_examples=80)
@given(
    row=st.lists(st.sampled_from([-math.inf, -2.0, -0.5, 0.0, 0.5, 1.0, 1.25]), min_size=2, max_size=100),
    top_k=st.integers(1, MAX_CANDIDATES),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 0.1]),
    min_p=st.sampled_from([0.0, 0.1, 0.9]),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 5.0]),
    surplus=st.integers(0, 20),
    cut=st.integers(0, 100),
    seed=st.integers(0, 2**64 - 1),
)
def test_candidates_choose_what_all_logits_do(
    row: list[float], top_k: int, top_p: float, min_p: float, temperature: float, surplus: int, cut: int, seed: int
) -> None:
    """Whatever the shards, and though another request in the step asked for more candidates."""
    if max(row) == -math.inf:
        row = [*row, 0.0]
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    logits = torch.tensor([row])
    for position in range(1, 6):
        sequence = at_position(position, params)
        k = candidates([sequence])
        assert k == (1 if temperature == 0.0 else top_k)
        parts = [pick(logits[:, :cut], k + surplus, 0), pick(logits[:, cut:], k + surplus, min(cut, len(row)))]
        (token,) = sample(logits.numpy(), [sequence])
        assert sample(merge(parts, k + surplus), [sequence]) == [token]
        if temperature == 0.0:
            assert token == row.index(max(row))


def test_how_many_candidates_are_needed() -> None:
    def needed(*params: SamplingParams) -> int:
        return candidates([at_position(1, p) for p in params])

    top = SamplingParams(top_k=40)
    assert needed() == 1
    assert needed(GREEDY, GREEDY) == 1
    assert needed(GREEDY, top, SamplingParams(top_k=5)) == 40
    assert needed(SamplingParams(top_k=MAX_CANDIDATES)) == MAX_CANDIDATES
    assert needed(top, SamplingParams(top_k=MAX_CANDIDATES + 1)) == 0
    for everything in (SamplingParams(), SamplingParams(top_k=-1), SamplingParams(top_p=0.9)):
        assert needed(GREEDY, everything) == 0
    assert needed(SamplingParams(temperature=0.0, top_p=0.5, min_p=0.1)) == 1


def test_the_batch_changes_nothing() -> None:
    rows = np.random.default_rng(1).standard_normal((6, 50)).astype(np.float32)
    settings = [{}, {"top_k": 4}, {"top_p": 0.6}, {"min_p": 0.2}, {"temperature": 0.0}, {"top_k": 20, "top_p": 0.9}]
    sequences = [at_position(3 + i, SamplingParams(seed=i % 2, **s)) for i, s in enumerate(settings)]
    whole = [sample(rows[i : i + 1], [sequence])[0] for i, sequence in enumerate(sequences)]
    for order in itertools.islice(itertools.permutations(range(6)), 0, 720, 97):
        assert sample(rows[list(order)], [sequences[i] for i in order]) == [whole[i] for i in order]


def test_seed_none_draws_a_fresh_one() -> None:
    seeds = {at_position(1, SamplingParams()).seed for _ in range(8)}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert at_position(1, SamplingParams(seed=5)).seed == 5


@pytest.mark.parametrize("bad", [math.nan, -math.inf, math.inf])
@pytest.mark.parametrize("params", [GREEDY, SamplingParams(seed=0), SamplingParams(top_k=3, seed=0)], ids=str)
def test_unusable_logits_are_an_error_of_their_request_alone(bad: float, params: SamplingParams) -> None:
    row = np.full(8, -1.0 if bad != -math.inf else bad, np.float32)
    row[5] = bad
    rows = np.stack([row, np.arange(8, dtype=np.float32)])
    sequences = [at_position(4, params), at_position(4, GREEDY)]
    for k in (0, 1, 3):
        logits = pick(torch.from_numpy(rows), k, 0) if k else rows
        error, token = sample(logits, sequences)
        assert isinstance(error, RequestError)
        assert "token 4 of request 7" in str(error)
        assert str(bad) in str(error)
        assert token == 7

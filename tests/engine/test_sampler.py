from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ringlm.engine.logits import merge, pick
from ringlm.engine.request import SamplingParams, TokenLogprob
from ringlm.engine.sampler import MAX_CANDIDATES, Chosen, Needed, needed, sample
from ringlm.engine.sequence import Limits, Sequence, begin
from ringlm.errors import RequestError

LIMITS = Limits(context=1 << 20, vocabulary=1000, eos_token_ids=frozenset((2, 4)))
GREEDY = SamplingParams(temperature=0.0)


def at_position(position: int, params: SamplingParams) -> Sequence:
    return begin(7, [0] * position, params, LIMITS)


@settings(max_examples=80, deadline=None)
@given(
    row=st.lists(st.sampled_from([-math.inf, -2.0, -0.5, 0.0, 0.5, 1.0, 1.25]), min_size=2, max_size=100),
    top_k=st.integers(1, MAX_CANDIDATES),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 0.1]),
    min_p=st.sampled_from([0.0, 0.1, 0.9]),
    typical_p=st.sampled_from([1.0, 0.9, 0.3]),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 5.0]),
    surplus=st.integers(0, 20),
    cut=st.integers(0, 100),
    seed=st.integers(0, 2**64 - 1),
)
def test_candidates_choose_what_all_logits_do(
    row: list[float],
    top_k: int,
    top_p: float,
    min_p: float,
    typical_p: float,
    temperature: float,
    surplus: int,
    cut: int,
    seed: int,
) -> None:
    """Whatever the shards, and though another request in the step asked for more candidates."""
    if max(row) == -math.inf:
        row = [*row, 0.0]
    params = SamplingParams(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, typical_p=typical_p, seed=seed
    )
    logits = torch.tensor([row])
    for position in range(1, 6):
        sequence = at_position(position, params)
        k = needed([sequence]).candidates
        assert k == (1 if temperature == 0.0 else top_k)
        parts = [pick(logits[:, :cut], k + surplus, 0), pick(logits[:, cut:], k + surplus, min(cut, len(row)))]
        (chosen,) = sample(logits.numpy(), [sequence])
        assert sample(merge(parts, k + surplus), [sequence]) == [chosen]
        if temperature == 0.0:
            assert chosen == Chosen(row.index(max(row)))


@settings(max_examples=80, deadline=None)
@given(
    row=st.lists(st.sampled_from([-math.inf, -2.0, 0.0, 1.0, 1.25]), min_size=6, max_size=40),
    temperature=st.sampled_from([0.0, 1.0]),
    top_k=st.integers(1, 5),
    min_tokens=st.integers(0, 6),
    bad=st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=2), max_size=3),
    logprobs=st.none() | st.integers(0, 5),
    cut=st.integers(0, 40),
)
def test_candidates_suffice_for_masks_and_logprobs(
    row: list[float],
    temperature: float,
    top_k: int,
    min_tokens: int,
    bad: list[list[int]],
    logprobs: int | None,
    cut: int,
) -> None:
    if max(row) == -math.inf:
        row = [*row, 0.0]
    params = SamplingParams(
        temperature=temperature, top_k=top_k, min_tokens=min_tokens, bad_token_ids=bad, logprobs=logprobs, seed=5
    )
    limits = LIMITS._replace(vocabulary=len(row))
    logits = torch.tensor([row])
    for prompt in ([0], [1, 2], [3, 4, 5]):
        sequence = begin(7, prompt, params, limits)
        k, log_sums = needed([sequence])
        assert k <= top_k + 2 + 3 + 5  # ends, bad ones, logprobs
        assert log_sums == (logprobs is not None)
        parts = [pick(logits[:, :cut], k, 0, log_sums), pick(logits[:, cut:], k, min(cut, len(row)), log_sums)]
        (whole,), (few,) = sample(logits.numpy(), [sequence]), sample(merge(parts, k), [sequence])
        if isinstance(whole, RequestError):
            assert str(few) == str(whole)
            continue
        assert isinstance(few, Chosen)
        assert few.token == whole.token
        if logprobs is None:
            assert few.logprob is whole.logprob is None
        else:
            assert few.logprob is not None
            assert whole.logprob is not None
            assert [token for token, _ in few.logprob.top] == [token for token, _ in whole.logprob.top]
            told = [[found.logprob, *(value for _, value in found.top)] for found in (few.logprob, whole.logprob)]
            np.testing.assert_allclose(told[0], told[1], atol=1e-5)


def test_what_is_needed_of_the_logits() -> None:
    def of(*params: SamplingParams, prompt: tuple[int, ...] = (1,)) -> Needed:
        return needed([begin(7, list(prompt), p, LIMITS) for p in params])

    top = SamplingParams(top_k=40)
    assert of() == (1, False)
    assert of(GREEDY, GREEDY) == (1, False)
    assert of(GREEDY, top, SamplingParams(top_k=5)) == (40, False)
    assert of(SamplingParams(top_k=MAX_CANDIDATES)) == (MAX_CANDIDATES, False)
    assert of(top, SamplingParams(top_k=MAX_CANDIDATES + 1)) == (0, False)
    for everything in (SamplingParams(), SamplingParams(top_k=-1), SamplingParams(top_p=0.9)):
        assert of(GREEDY, everything) == (0, False)
    assert of(SamplingParams(temperature=0.0, top_p=0.5, min_p=0.1)) == (1, False)
    assert of(GREEDY.replace(logprobs=0)) == (1, True)
    assert of(GREEDY.replace(logprobs=20), top) == (40, True)
    assert of(GREEDY.replace(logprobs=20), SamplingParams()) == (0, False)
    assert of(GREEDY.replace(min_tokens=3)) == (3, False)  # two ends may be better than what is left
    assert of(GREEDY.replace(bad_token_ids=((5,), (1, 6), (3, 1, 7), (2, 8)))) == (3, False)
    assert of(GREEDY.replace(bad_token_ids=((3, 1, 7),)), prompt=(3, 1)) == (2, False)
    assert of(GREEDY.replace(bad_token_ids=[[i] for i in range(MAX_CANDIDATES)])) == (0, False)
    for all_of_them in ({"repetition_penalty": 1.1}, {"presence_penalty": 0.1}, {"logit_bias": {3: 1.0}}):
        assert of(GREEDY.replace(**all_of_them)) == (0, False)


def test_ends_are_masked_only_until_min_tokens() -> None:
    row = np.zeros((1, 1000), np.float32)
    row[0, [2, 4, 9]] = 3.0, 2.0, 1.0
    sequence = begin(7, [1, 1, 1], GREEDY.replace(min_tokens=2, stop_token_ids=(9, 1003)), LIMITS)
    for token in (0, 0, 2):
        assert sample(row, [sequence]) == [Chosen(token)]
        sequence.append(token)
    ignoring = begin(7, [1], GREEDY.replace(min_tokens=2, ignore_eos=True), LIMITS)
    assert sample(row, [ignoring]) == [Chosen(2)]  # it would end nothing


def test_logprobs_are_the_models_own_before_anything_is_done() -> None:
    row = np.array([[0.3, -1.0, 2.0, 1.0, -np.inf, 2.0, 0.0]], np.float32)
    reference = torch.from_numpy(row[0]).double().log_softmax(0).tolist()
    params = SamplingParams(temperature=0.0, logprobs=20, logit_bias={1: 50.0}, repetition_penalty=2.0)
    (chosen,) = sample(row, [begin(7, [2, 2, 5], params, LIMITS._replace(vocabulary=7))])
    assert isinstance(chosen, Chosen)
    assert chosen.logprob is not None
    token, logprob, top = chosen.logprob
    assert token == chosen.token == 1
    assert logprob == pytest.approx(reference[1], abs=1e-6)
    assert [token for token, _ in top] == [2, 5, 3, 0, 6, 1]  # in order, and none that has no probability
    assert [value for _, value in top] == pytest.approx([reference[token] for token, _ in top], abs=1e-6)
    (chosen,) = sample(row, [begin(7, [2], params.replace(logprobs=0), LIMITS._replace(vocabulary=7))])
    assert chosen == Chosen(1, TokenLogprob(1, logprob, []))


@pytest.mark.parametrize(
    ("params", "names"),
    [
        (GREEDY.replace(bad_token_ids=[[i] for i in range(6)]), "bad_token_ids"),
        (SamplingParams(stop_token_ids=[*range(6)], min_tokens=1), "min_tokens"),
        (GREEDY.replace(bad_token_ids=[[0, 1], [5], [3], [0]], min_tokens=2), "bad_token_ids and min_tokens"),
    ],
    ids=str,
)
def test_a_row_without_a_token_to_choose_is_an_error_that_names_the_parameters(
    params: SamplingParams, names: str
) -> None:
    rows = np.zeros((2, 6), np.float32)
    excluded, other = sample(rows, [begin(7, [0], params, LIMITS._replace(vocabulary=6)), at_position(1, GREEDY)])
    assert isinstance(excluded, RequestError)
    assert f"token 1 of request 7: every token that the model could write is excluded by {names}." in str(excluded)
    assert other == Chosen(0)


def test_the_batch_changes_nothing() -> None:
    rows = np.random.default_rng(1).standard_normal((6, 50)).astype(np.float32)
    settings = [
        {"repetition_penalty": 1.3, "logprobs": 2},
        {"top_k": 4, "bad_token_ids": [[0, 7]]},
        {"top_p": 0.6},
        {"min_p": 0.2, "logit_bias": {5: 1.0}},
        {"temperature": 0.0},
        {"top_k": 20, "typical_p": 0.9},
    ]
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
@pytest.mark.parametrize(
    "params",
    [GREEDY, SamplingParams(seed=0), SamplingParams(top_k=3, seed=0), SamplingParams(logit_bias={5: -1.0}, logprobs=2)],
    ids=str,
)
def test_unusable_logits_are_an_error_of_their_request_alone(bad: float, params: SamplingParams) -> None:
    row = np.full(8, -1.0 if bad != -math.inf else bad, np.float32)
    row[5] = bad
    rows = np.stack([row, np.arange(8, dtype=np.float32)])
    sequences = [at_position(4, params), at_position(4, GREEDY)]
    for k in (0, 1, 3):
        logits = pick(torch.from_numpy(rows), k, 0) if k else rows
        error, chosen = sample(logits, sequences)
        assert isinstance(error, RequestError)
        assert "token 4 of request 7" in str(error)
        assert str(bad) in str(error)
        assert chosen == Chosen(7)

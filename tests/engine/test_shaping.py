"""What is done to logits before the temperature, beside transformers' processors and OpenAI's formula."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as theirs

from ringlm.engine.request import SamplingParams
from ringlm.engine.shaping import Shaping
from ringlm.errors import RequestError

VOCABULARY = 50
PROMPT, OUTPUT = [3, 7, 7, 11, 3, 20], [7, 30, 30, 30, 4, 20, 31]
ENDS = frozenset({4, 9, 1000})


def shaped(row: np.ndarray, params: SamplingParams, output: list[int]) -> np.ndarray:
    """After `output` has been written token by token."""
    made = Shaping.of(params, PROMPT, ENDS, VOCABULARY)
    assert isinstance(made, Shaping)
    for token in output:
        made.add(token)
    return made.apply(row, PROMPT + output, None)


def random_row(seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(VOCABULARY) * 4).astype(np.float32)


@pytest.mark.parametrize(
    ("params", "processor"),
    [
        ({"repetition_penalty": 1.3}, theirs.RepetitionPenaltyLogitsProcessor(1.3)),
        ({"repetition_penalty": 0.7}, theirs.RepetitionPenaltyLogitsProcessor(0.7)),
        ({"min_tokens": 8}, theirs.MinNewTokensLengthLogitsProcessor(len(PROMPT), 8, [4, 9], device="cpu")),
        ({"min_tokens": 7}, theirs.MinNewTokensLengthLogitsProcessor(len(PROMPT), 7, [4, 9], device="cpu")),
        ({"logit_bias": {3: 2.5, 49: -100.0}}, theirs.SequenceBiasLogitsProcessor([[[3], 2.5], [[49], -100.0]])),
        (
            {"bad_token_ids": [[5], [20, 31, 6], [31, 8], [4, 31, 10], [5, 12]]},
            theirs.NoBadWordsLogitsProcessor([[5], [20, 31, 6], [31, 8], [4, 31, 10], [5, 12]]),
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_each_parameter_is_transformers_processor(params: dict, processor: theirs.LogitsProcessor) -> None:
    row = random_row()
    reference = processor(torch.tensor([PROMPT + OUTPUT]), torch.from_numpy(row)[None])[0].numpy()
    np.testing.assert_array_equal(shaped(row, SamplingParams(**params), OUTPUT), reference)
    np.testing.assert_array_equal(row, random_row())  # the model's own stay


def test_a_bad_sequence_may_begin_in_the_prompt_and_be_longer_than_it() -> None:
    params = SamplingParams(bad_token_ids=[[3, 20, 1], [9] * 6 + PROMPT + [2]])
    assert set(np.flatnonzero(np.isinf(shaped(random_row(), params, [])))) == {1}


@pytest.mark.parametrize("presence", [0.0, 0.9, -1.5])
@pytest.mark.parametrize("frequency", [0.0, 0.6, -0.3])
@pytest.mark.parametrize("repetition", [1.0, 1.2])
def test_penalties_count_what_was_written(presence: float, frequency: float, repetition: float) -> None:
    """Of the prompt only repetition knows. 300 tokens, so that the counts outgrow their first arrays."""
    output = np.random.default_rng(1).integers(0, VOCABULARY, 300).tolist()
    params = SamplingParams(
        presence_penalty=presence, frequency_penalty=frequency, repetition_penalty=repetition, logit_bias={0: 0.0}
    )
    for length in (0, 1, 7, 300):
        row, counts = random_row(length), Counter(output[:length])
        reference = row.astype(np.float64)
        for token in range(VOCABULARY):
            if token in counts or token in PROMPT:
                reference[token] *= repetition if reference[token] < 0 else 1 / repetition
            reference[token] -= frequency * counts[token] + (presence if counts[token] else 0.0)
        np.testing.assert_allclose(shaped(row, params, output[:length]), reference, rtol=1e-5, atol=1e-5)


def test_the_order_is_masks_then_biases_then_penalties() -> None:
    row = np.full(VOCABULARY, -1.0, np.float32)
    params = SamplingParams(
        bad_token_ids=[[3]], logit_bias={3: 100.0, 7: 5.0}, repetition_penalty=2.0, presence_penalty=0.25
    )
    found = shaped(row, params, [7])
    assert found[3] == -np.inf
    assert found[7] == (-1.0 + 5.0) / 2.0 - 0.25
    assert found[11] == -2.0


def test_nothing_to_do_is_nothing() -> None:
    plain = SamplingParams(temperature=0.3, top_p=0.5, logprobs=3, stop_token_ids=(4,))
    assert Shaping.of(plain, PROMPT, ENDS, VOCABULARY) is None


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"logit_bias": {3: 1.0, VOCABULARY: 1.0}}, f"logit_bias has token {VOCABULARY}; .* are 0 to {VOCABULARY - 1}"),
        ({"bad_token_ids": [[1, 2], [-1]]}, "bad_token_ids has token -1"),
        ({"bad_token_ids": [[77, 2]]}, "bad_token_ids has token 77"),
    ],
)
def test_tokens_that_the_model_does_not_have_are_refused(params: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Shaping.of(SamplingParams(**params), PROMPT, ENDS, VOCABULARY)

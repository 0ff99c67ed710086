"""Sampling parameters as the engine takes them: each answer's own, words and strings become token ids or stay here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from ringlm.engine.request import SamplingParams, StructuredOutputsParams
from ringlm.errors import RequestError

if TYPE_CHECKING:
    from ringlm.frontend.tokenizer import Tokenizer


def check_tokens(tokens: Iterable[int], vocabulary: int, what: str = "token id") -> None:
    """Raises RequestError for the first of `tokens` that the model does not have."""
    wrong = next((token for token in tokens if not 0 <= token < vocabulary), None)
    if wrong is not None:
        raise RequestError(f"{wrong} is no {what}; this model has 0 to {vocabulary - 1:,}.")


def for_engine(
    params: SamplingParams, tokenizer: Tokenizer | None, vocabulary: int, grammar: str | None = None
) -> list[SamplingParams]:
    """What to ask of the engine for each of the answers, `best_of` of them; number i has the seed `seed` + i. All
    follow `grammar`, which is what their shape has become.

    Raises RequestError for tokens that the model does not have, and for words where it has no tokenizer.
    """
    if tokenizer is None and (params.stop or params.bad_words):
        raise RequestError("stop and bad_words need a tokenizer, and this model has none; use token ids.")
    check_tokens(params.logit_bias, vocabulary, "token id for logit_bias")
    check_tokens((token for ids in params.bad_token_ids for token in ids), vocabulary, "token id for bad_token_ids")
    count = params.best_of or params.n
    ends = () if params.ignore_eos or tokenizer is None else tokenizer.eos_token_ids
    bad = tuple(_spelled(params.bad_words, tokenizer)) if tokenizer is not None else ()
    sent = params.replace(
        n=1,
        best_of=None,
        stop=(),  # strings are searched for in the text
        stop_token_ids=(*params.stop_token_ids, *ends),
        bad_words=(),
        bad_token_ids=(*params.bad_token_ids, *bad),
        structured_outputs=None if grammar is None else StructuredOutputsParams(grammar=grammar),
        logprobs=0 if params.logprobs is None and count > params.n else params.logprobs,
    )
    if params.seed is None:
        return [sent] * count
    return [sent, *(sent.replace(seed=(params.seed + index) % 2**64) for index in range(1, count))]


def _spelled(words: Iterable[str], tokenizer: Tokenizer) -> Iterator[tuple[int, ...]]:
    """Each word at the start of a text, and after a space."""
    for word in words:
        bare = word.lstrip()
        yield from dict.fromkeys(tuple(tokenizer.encode(text, special=False)) for text in (bare, f" {bare}") if text)

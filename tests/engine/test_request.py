from __future__ import annotations

from typing import Any

import msgspec
import pytest

from ringlm.engine.request import SamplingParams
from ringlm.errors import RequestError


def test_what_callers_write_becomes_what_is_declared() -> None:
    params = SamplingParams(
        temperature=1, stop="END", bad_words=["a", "b"], stop_token_ids={5}, bad_token_ids=((1, 2),), logit_bias={3: 1}
    )
    assert isinstance(params.temperature, float)
    assert (params.stop, params.bad_words, params.stop_token_ids) == (("END",), ("a", "b"), (5,))
    assert [list(ids) for ids in params.bad_token_ids] == [[1, 2]]
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"temperature": "hot"}, "temperature is 'hot': Expected `float`"),
        ({"temperature": float("nan")}, "temperature is nan; it must be between 0 and 100"),
        ({"max_tokens": None}, "max_tokens is None: Expected `int`"),
        ({"max_tokens": 3, "min_tokens": 4}, "min_tokens is 4; it must be between 0 and max_tokens"),
        ({"typical_p": 0.0}, "typical_p is 0.0; it must be above 0 and at most 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; it must be between 0.01 and 100"),
        ({"presence_penalty": 2.5}, "presence_penalty is 2.5; it must be between -2 and 2"),
        ({"logit_bias": {1: float("nan")}}, "logit_bias is .*; it must be between -100 and 100"),
        ({"stop": [""]}, "stop is .*; it must be strings that are not empty"),
        ({"stop": 5}, "stop is 5: Expected `array`"),
        ({"bad_token_ids": [[]]}, "bad_token_ids is .*; it must be sequences that are not empty"),
        ({"seed": 2**64}, "seed is .*; it must be a whole number of 64 bits"),
        ({"logprobs": 21}, "logprobs is 21; it must be between 0 and 20"),
    ],
    ids=str,
)
def test_values_that_make_no_sense_are_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParams(**params)

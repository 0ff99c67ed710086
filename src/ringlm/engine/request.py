"""A request and how it ends: sampling parameters and stop reasons. Knows token ids, no text, no torch."""

from __future__ import annotations

import enum
import functools
from collections.abc import Sequence
from typing import Any, Final, NamedTuple, get_origin, get_type_hints

import msgspec

from ringlm.errors import RequestError

MAX_CHOICES: Final = 128
MAX_LOGPROBS: Final = 20


class StopReason(str, enum.Enum):
    """Why a generation ended. Prints as the OpenAI API spells it."""

    STOP = "stop"  # an end-of-sequence token or a stop string
    LENGTH = "length"  # max_tokens, or the context is full
    TOOL_CALLS = "tool_calls"  # the answer is a call of the caller's tools
    CANCELED = "canceled"  # the caller ended it

    def __str__(self) -> str:
        return self.value


class StructuredOutputsParams(msgspec.Struct, frozen=True, kw_only=True):
    """The shape of an answer, by one of these; the names are vLLM's.

    `json` is a JSON schema, or its text; `json_object` asks for any JSON object; `regex` is matched by the whole
    answer, in the syntax of Rust's crate; the answer is one of the texts `choice`; `grammar` is in llguidance's Lark.
    """

    json: dict[str, Any] | str | bool | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    def __post_init__(self) -> None:
        given = [name for name in self.__struct_fields__ if getattr(self, name) not in (None, False)]
        if len(given) != 1 and self.json is not False:
            raise RequestError(
                f"structured_outputs has {' and '.join(given) or 'nothing'}; give one of "
                f"{', '.join(self.__struct_fields__)}."
            )
        if self.choice is not None and not self.choice:
            raise RequestError("structured_outputs: choice is empty; give at least one text.")


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How to choose tokens and when to stop; the names are vLLM's.

    Of `best_of` answers (None: `n`) the `n` likeliest are given. temperature 0 is greedy. top_k 0 or -1 keeps every
    token; top_p 1, min_p 0 and typical_p 1 likewise. `repetition_penalty` divides or multiplies the logits of tokens of
    the prompt and the answer; `presence_penalty` and `frequency_penalty` are taken from those of the answer, once and
    as often as they occur. `logit_bias` is added by token id. `seed` None draws a fresh one. `logprobs` asks for that
    of each token and of so many of the likeliest. `stop` are strings (kept out of the text), `stop_token_ids` are ids;
    neither ends an answer of less than `min_tokens`. `bad_words` are texts that must not be written, `bad_token_ids`
    the same as sequences of ids. `structured_outputs` prescribes the shape of the answer, which ends where nothing can
    follow, whatever `min_tokens` and `ignore_eos` say.
    """

    n: int = 1
    best_of: int | None = None
    max_tokens: int = 512
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    logprobs: int | None = None
    stop: Sequence[str] = ()  # or one string
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    bad_words: Sequence[str] = ()  # or one string
    bad_token_ids: Sequence[Sequence[int]] = ()
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        for name, kind in _types().items():
            self._convert(name, kind)

        def check(ok: bool, name: str, rule: str) -> None:
            if not ok:
                raise RequestError(f"{name} is {getattr(self, name)!r}; it must be {rule}.")

        check(1 <= self.n <= MAX_CHOICES, "n", f"between 1 and {MAX_CHOICES}")
        check(self.best_of is None or self.n <= self.best_of <= MAX_CHOICES, "best_of", f"n to {MAX_CHOICES}")
        check(self.max_tokens >= 1, "max_tokens", "1 or more")
        check(0 <= self.min_tokens <= self.max_tokens, "min_tokens", "between 0 and max_tokens")
        check(0.0 <= self.temperature <= 100.0, "temperature", "between 0 and 100")
        check(self.top_k >= -1, "top_k", "-1 or 0 (every token) or more")
        check(0.0 < self.top_p <= 1.0, "top_p", "above 0 and at most 1")
        check(0.0 <= self.min_p <= 1.0, "min_p", "between 0 and 1")
        check(0.0 < self.typical_p <= 1.0, "typical_p", "above 0 and at most 1")
        check(0.01 <= self.repetition_penalty <= 100.0, "repetition_penalty", "between 0.01 and 100")
        check(-2.0 <= self.presence_penalty <= 2.0, "presence_penalty", "between -2 and 2")
        check(-2.0 <= self.frequency_penalty <= 2.0, "frequency_penalty", "between -2 and 2")
        check(all(-100.0 <= bias <= 100.0 for bias in self.logit_bias.values()), "logit_bias", "between -100 and 100")
        check(self.seed is None or -(2**63) <= self.seed < 2**64, "seed", "a whole number of 64 bits")
        check(self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, "logprobs", f"between 0 and {MAX_LOGPROBS}")
        check(all(self.stop), "stop", "strings that are not empty")
        check(all(self.bad_words), "bad_words", "texts that are not empty")
        check(all(self.bad_token_ids), "bad_token_ids", "sequences that are not empty")

    def _convert(self, name: str, kind: Any) -> None:
        """Make the field what its annotation says: of an int a float, of any sequence a tuple."""
        value = getattr(self, name)
        several = get_origin(kind) is Sequence
        if several and isinstance(value, str):
            value = (value,)
        try:
            value = msgspec.convert(value, kind)
        except msgspec.ValidationError as error:
            raise RequestError(f"{name} is {value!r}: {error}.") from None
        msgspec.structs.force_setattr(self, name, tuple(value) if several else value)

    def replace(self, **changes: Any) -> SamplingParams:
        """A copy with some fields changed."""
        return msgspec.structs.replace(self, **changes)


@functools.cache
def _types() -> dict[str, Any]:
    return get_type_hints(SamplingParams)


class TokenLogprob(NamedTuple):
    """The natural logarithm of a token's probability at temperature 1, and the likeliest tokens with theirs."""

    token: int
    logprob: float
    top: list[tuple[int, float]]

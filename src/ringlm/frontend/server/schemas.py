"""What requests for text have in common, and what answers them: fields, limits, their meaning for the engine.

Null stands for a field's default, as OpenAI's clients send it. Structs are the types, the limits and the OpenAPI
document at once.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, TypeAlias

import msgspec
from msgspec import Meta

from ringlm.engine.request import MAX_CHOICES, SamplingParams, StructuredOutputsParams
from ringlm.frontend.server.errors import APIError

TokenId: TypeAlias = Annotated[int, Meta(ge=0, lt=1 << 31)]
Count: TypeAlias = Annotated[int, Meta(ge=1, lt=1 << 31)]
Name: TypeAlias = Annotated[str, Meta(min_length=1, max_length=256)]
Short: TypeAlias = Annotated[str, Meta(max_length=64)]
Id: TypeAlias = Annotated[str, Meta(max_length=256)]
Parallel: TypeAlias = Annotated[bool | None, Meta(description="false: of several calls the first is told.")]
Variables: TypeAlias = Annotated[
    dict[str, Any] | None, Meta(description="Variables for the chat template, such as enable_thinking.")
]
Text: TypeAlias = Annotated[str, Meta(min_length=1, max_length=4096)]
# One prompt or many; msgspec has no union of lists, so `prompts` sees to it that all are of one kind.
Prompts: TypeAlias = (
    str
    | Annotated[list[str | TokenId | Annotated[list[TokenId], Meta(min_length=1)]], Meta(min_length=1, max_length=2048)]
)


def prompts(given: Prompts, param: str) -> list[str | list[int]]:
    """The prompts of `param`: a text, token ids, or a list of either."""
    if isinstance(given, str):
        return [given]
    if all(isinstance(each, str) for each in given) or all(isinstance(each, list) for each in given):
        return given  # type: ignore[return-value]
    if all(isinstance(each, int) for each in given):
        return [given]  # type: ignore[list-item]
    raise APIError(400, f"{param} mixes texts, token ids and lists; send one kind of them.", param=param)


class OfModel(msgspec.Struct, kw_only=True):
    """A body about a model."""

    model: Annotated[str | None, Meta(description="The served model's id, which may be left out.")] = None


class StreamOptions(msgspec.Struct, kw_only=True):
    """`include_usage`: the last event before the end has the counts of tokens, and no choices."""

    include_usage: bool | None = None


class Sampling(OfModel, kw_only=True):
    """How to choose tokens and when to stop: OpenAI's fields, and those of vLLM's server with its names."""

    refused: ClassVar[dict[str, str]] = {
        "prompt_logprobs": "logprobs are those of answers only",
        "use_beam_search": "there is no beam search",
    }

    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: Annotated[Count | None, Meta(description="The longest answer; else as much as the context holds.")] = (
        None
    )
    min_tokens: Annotated[int, Meta(ge=0, lt=1 << 31)] | None = None
    temperature: Annotated[
        Annotated[float, Meta(ge=0, le=100)] | None,
        Meta(description="0 always takes the likeliest token; 1 if not given."),
    ] = None
    top_k: Annotated[int, Meta(ge=-1, lt=1 << 31)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    typical_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    logit_bias: Annotated[
        dict[int, Annotated[float, Meta(ge=-100, le=100)]] | None,
        Meta(description="What to add to logits, by token id."),
    ] = None
    seed: Annotated[
        Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | None,
        Meta(description="The same seed, the same answer."),
    ] = None
    stop: Annotated[
        Text | Annotated[list[Text], Meta(max_length=64)] | None,
        Meta(description="Texts that end an answer and are no part of it."),
    ] = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=256)] | None = None
    ignore_eos: bool | None = None
    bad_words: Annotated[
        Annotated[list[Text], Meta(max_length=256)] | None, Meta(description="Texts that must not be written.")
    ] = None
    structured_outputs: Annotated[
        StructuredOutputsParams | None, Meta(description="The shape of the answer, by one of these.")
    ] = None
    guided_json: Annotated[dict[str, Any] | str | None, Meta(description="As structured_outputs.json.")] = None
    guided_regex: Annotated[str | None, Meta(description="As structured_outputs.regex.")] = None
    guided_choice: Annotated[list[str] | None, Meta(description="As structured_outputs.choice.")] = None
    guided_grammar: Annotated[str | None, Meta(description="As structured_outputs.grammar.")] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str | None, Meta(description="Ignored.")] = None

    @property
    def include_usage(self) -> bool:
        """Raises APIError for options of a stream without one."""
        if self.stream_options is not None and not self.stream:
            raise APIError(400, "stream_options are for streams; send stream: true.", param="stream_options")
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def shape(self) -> StructuredOutputsParams | None:
        """What the answer is to be like, by whichever name it was asked for. Raises APIError where two say it."""
        asked = {"structured_outputs": self.structured_outputs} | {
            f"guided_{name}": StructuredOutputsParams(**{name: value})
            for name in ("json", "regex", "choice", "grammar")
            if (value := getattr(self, f"guided_{name}")) is not None
        }
        given = {name: shape for name, shape in asked.items() if shape is not None}
        if len(given) > 1:
            raise APIError(
                400, f"{' and '.join(given)} both say what the answer is to be like; send one.", param=max(given)
            )
        return next(iter(given.values()), None)

    def params(self, context: int, **more: Any) -> SamplingParams:
        """These fields for an engine of `context` positions, with `more`. Raises RequestError."""
        fields = SamplingParams.__struct_fields__
        given = {name: getattr(self, name) for name in self.__struct_fields__ if name in fields}
        given["structured_outputs"] = self.shape
        if isinstance(self.stop, str):
            given["stop"] = [self.stop]
        given = {"max_tokens": context} | {name: value for name, value in (given | more).items() if value is not None}
        return msgspec.convert(given, SamplingParams)


class CachedTokens(msgspec.Struct):
    """Of a prompt's tokens, those found in the prefix cache."""

    cached_tokens: int


class Usage(msgspec.Struct):
    """Counts of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens

    @classmethod
    def of(cls, prompt: int, completion: int, cached: int) -> Usage:
        return cls(prompt, completion, prompt + completion, CachedTokens(cached))

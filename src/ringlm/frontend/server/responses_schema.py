"""The fields of /v1/responses, asked and answered, in the shape of OpenAI's Responses."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from ringlm.frontend.server.chat_schema import ContentPart
from ringlm.frontend.server.schemas import Count, Id, Name, OfModel, Parallel, Short, Variables


class InputItem(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A message, a function_call with its call_id, name and arguments, a function_call_output, or reasoning."""

    type: Short = "message"
    role: Annotated[str, Meta(min_length=1, max_length=64)] | None = None
    content: str | list[ContentPart] | None = None
    summary: list[ContentPart] | None = None
    call_id: Id | None = None
    name: Name | None = None
    namespace: Id | None = None
    arguments: str | None = None
    output: str | list[ContentPart] | None = None


class ResponsesTool(msgspec.Struct, kw_only=True):
    """A function, or a namespace with functions. Tools of other types would be the server's, which has none: they are
    not offered to the model."""

    type: Short = "function"
    name: Name | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    tools: Annotated[list[ResponsesTool], Meta(max_length=128)] | None = None


class TextFormat(msgspec.Struct, kw_only=True):
    """What the text of an answer must be."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class TextOptions(msgspec.Struct, kw_only=True):
    """`format` is as response_format of /v1/chat/completions, but flat."""

    format: TextFormat | None = None


class Reasoning(msgspec.Struct, kw_only=True):
    """`effort` reaches the chat template as reasoning_effort; none switches enable_thinking off."""

    effort: Short | None = None


class InputRequest(OfModel, kw_only=True):
    """A conversation: what came before by `previous_response_id`, and what is new."""

    input: str | Annotated[list[InputItem], Meta(max_length=4096)]
    instructions: Annotated[str | None, Meta(description="What the system says, for this answer only.")] = None
    previous_response_id: Annotated[str, Meta(max_length=128)] | None = None
    tools: Annotated[list[ResponsesTool], Meta(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: Parallel = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    chat_template_kwargs: Variables = None


class ResponsesRequest(InputRequest, kw_only=True):
    """The next turn of a conversation."""

    refused: ClassVar[dict[str, str]] = {
        "conversation": "send the items, or previous_response_id",
        "prompt": "no prompts are kept here; send instructions and input",
        "top_logprobs": "/v1/chat/completions tells logprobs",
    }

    max_output_tokens: Annotated[
        Count | None, Meta(description="The longest answer, reasoning included; else as much as the context holds.")
    ] = None
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    metadata: Annotated[dict[str, str], Meta(max_length=16)] | None = None
    store: Annotated[bool | None, Meta(description="Unless false, the answer is kept in memory for a while.")] = None
    background: Annotated[bool | None, Meta(description="Must not be true.")] = None
    stream: bool | None = None


class OutputText(msgspec.Struct, kw_only=True, tag_field="type", tag="output_text"):
    text: str
    annotations: list[dict[str, Any]] = []
    logprobs: list[dict[str, Any]] = []


class ReasoningText(msgspec.Struct, kw_only=True, tag_field="type", tag="reasoning_text"):
    text: str


Status = Literal["in_progress", "completed", "incomplete"]


class OutputMessage(msgspec.Struct, kw_only=True, tag_field="type", tag="message"):
    """What the assistant says."""

    id: str
    role: Literal["assistant"] = "assistant"
    status: Status
    content: list[OutputText]


class ReasoningItem(msgspec.Struct, kw_only=True, tag_field="type", tag="reasoning"):
    """What the model thinks, as it is."""

    id: str
    status: Status
    summary: list[dict[str, Any]] = []
    content: list[ReasoningText]


class FunctionCallItem(msgspec.Struct, kw_only=True, tag_field="type", tag="function_call"):
    """A call of one of the caller's tools; `arguments` is JSON as the model wrote it."""

    id: str
    call_id: str
    name: str
    namespace: str | UnsetType = UNSET
    arguments: str
    status: Status


Item = OutputMessage | ReasoningItem | FunctionCallItem


class CachedInput(msgspec.Struct):
    """Of the input's tokens, those found in the prefix cache."""

    cached_tokens: int
    cache_write_tokens: int = 0


class ReasoningOutput(msgspec.Struct):
    reasoning_tokens: int


class ResponsesUsage(msgspec.Struct, kw_only=True):
    """Counts of tokens."""

    input_tokens: int
    input_tokens_details: CachedInput
    output_tokens: int
    output_tokens_details: ReasoningOutput
    total_tokens: int


class Incomplete(msgspec.Struct):
    reason: Literal["max_output_tokens"] = "max_output_tokens"


class Failure(msgspec.Struct):
    """Why a stream broke off."""

    code: str
    message: str


class ResponseObject(msgspec.Struct, kw_only=True):
    """An answer, with what was asked of it."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Literal["in_progress", "completed", "incomplete", "failed"] = "in_progress"
    error: Failure | None = None
    incomplete_details: Incomplete | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[Item] = []
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: dict[str, Any]
    store: bool
    temperature: float | None
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_p: float | None
    truncation: Literal["disabled"] = "disabled"
    usage: ResponsesUsage | None = None


class ResponseEvent(msgspec.Struct, kw_only=True):
    """An event of a stream, numbered in order; `type` says which of the fields it has."""

    type: str
    sequence_number: int
    response: ResponseObject | UnsetType = UNSET
    output_index: int | UnsetType = UNSET
    item: Item | UnsetType = UNSET
    item_id: str | UnsetType = UNSET
    content_index: int | UnsetType = UNSET
    part: OutputText | ReasoningText | UnsetType = UNSET
    delta: str | UnsetType = UNSET
    text: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET
    logprobs: list[dict[str, Any]] | UnsetType = UNSET


class InputTokens(msgspec.Struct, kw_only=True):
    """How many tokens a conversation has, in the chat template."""

    object: Literal["response.input_tokens"] = "response.input_tokens"
    input_tokens: int


class Deleted(msgspec.Struct, kw_only=True):
    """A response that is kept no longer."""

    id: str
    object: Literal["response"] = "response"
    deleted: bool = True

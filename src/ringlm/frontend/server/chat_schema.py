"""The fields of /v1/chat/completions, asked and answered, in OpenAI's shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from ringlm.engine.request import MAX_LOGPROBS, StructuredOutputsParams
from ringlm.frontend.answer import Choice, Logprob, Piece, ToolCallDelta
from ringlm.frontend.server.errors import APIError
from ringlm.frontend.server.schemas import Count, Id, Name, Parallel, Sampling, Short, Usage, Variables

# What decides how a template is applied is no variable of it.
_TAKEN = {
    *("messages", "params", "tools", "tool_choice", "conversation", "chat_template"),
    *("add_generation_prompt", "continue_final_message", "tokenize", "padding", "truncation", "max_length"),
    *("return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
}


class Function(msgspec.Struct, kw_only=True):
    """A function that the model may call; `parameters` is a JSON Schema of its arguments."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, kw_only=True):
    """A tool of the caller's."""

    function: Function
    type: Literal["function"] = "function"


class ContentPart(msgspec.Struct, kw_only=True):
    """A part of a message; this version reads `text` only."""

    type: Short
    text: str | None = None


class FunctionCall(msgspec.Struct, kw_only=True):
    """`arguments` is a JSON object as text."""

    name: Name
    arguments: str


class ToolCallMessage(msgspec.Struct, kw_only=True):
    """A call that the model has made."""

    function: FunctionCall
    id: Id | None = None
    type: Literal["function"] = "function"


class Message(msgspec.Struct, kw_only=True):
    """One turn of the conversation. Fields beyond these reach the model's chat template as they are."""

    role: Annotated[str, Meta(min_length=1, max_length=64, description="system, developer, user, assistant or tool")]
    content: str | list[ContentPart] | None = None
    name: Id | None = None
    tool_calls: Annotated[list[ToolCallMessage], Meta(max_length=128)] | None = None
    tool_call_id: Id | None = None


class NamedSchema(msgspec.Struct, kw_only=True):
    """A JSON schema; answers are held to it whether it is `strict` or not."""

    schema: dict[str, Any] | None = None
    name: Name | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, kw_only=True):
    """Text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: NamedSchema | None = None


class ChatRequest(Sampling, kw_only=True):
    """The next turn of a conversation."""

    refused: ClassVar[dict[str, str]] = Sampling.refused | {
        "best_of": "only /v1/completions takes it",
        "functions": "it is what tools were before",
        "function_call": "it is what tool_choice was before",
        "audio": "answers are text",
        "prediction": "an answer cannot be foretold",
        "web_search_options": "the server searches nothing",
    }

    messages: Annotated[list[Message], Meta(min_length=1, max_length=4096)]
    max_completion_tokens: Annotated[Count | None, Meta(description="As max_tokens, which it beats.")] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Meta(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: Parallel = None
    response_format: ResponseFormat | None = None
    modalities: list[str] | None = None
    chat_template_kwargs: Variables = None

    def check(self) -> None:
        """Raises APIError for what this version cannot do, by the name of the field."""
        taken = sorted((self.chat_template_kwargs or {}).keys() & _TAKEN)
        if taken:
            raise APIError(400, f"chat_template_kwargs may not set {', '.join(taken)}.", param="chat_template_kwargs")
        if self.modalities is not None and self.modalities != ["text"]:
            raise APIError(400, "modalities other than text are not supported.", param="modalities")
        if self.top_logprobs is not None and not self.logprobs:
            raise APIError(400, "top_logprobs needs logprobs: true.", param="top_logprobs")

    @property
    def shape(self) -> StructuredOutputsParams | None:
        """What the answer is to be like. Raises APIError where two fields say it, or one says half of it."""
        asked, format = super().shape, self.response_format
        if format is None or format.type == "text":
            return asked
        if asked is not None:
            raise APIError(400, "response_format and another field say what the answer is to be like; send one.")
        if format.type == "json_object":
            return StructuredOutputsParams(json_object=True)
        if format.json_schema is None:
            raise APIError(400, "response_format json_schema needs json_schema: {schema}.", param="response_format")
        return StructuredOutputsParams(json=format.json_schema.schema or {})

    @property
    def shown_logprobs(self) -> int | None:
        """How many of the likeliest tokens to show beside each; None: no logprobs."""
        return (self.top_logprobs or 0) if self.logprobs else None


class TopLogprob(msgspec.Struct):
    """A token, the logarithm of its probability, and its bytes, which need not be whole characters."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token of the answer, and the likeliest in its place."""

    top_logprobs: list[TopLogprob]


class Logprobs(msgspec.Struct):
    """Those of an answer's tokens, or of a part of them."""

    content: list[TokenLogprob]
    refusal: None = None

    @classmethod
    def of(cls, logprobs: Sequence[Logprob]) -> Logprobs | None:
        if not logprobs:
            return None
        return cls(
            [
                TokenLogprob(
                    each.text,
                    each.logprob,
                    list(each.data),
                    [TopLogprob(top.text, top.logprob, list(top.data)) for top in each.top],
                )
                for each in logprobs
            ]
        )


class AnswerMessage(msgspec.Struct, kw_only=True):
    """What the assistant says; `content` is null where it only calls tools."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallMessage] | UnsetType = UNSET
    refusal: None = None


class ChatChoice(msgspec.Struct, kw_only=True):
    """One of the answers."""

    index: int
    message: AnswerMessage
    logprobs: Logprobs | None
    finish_reason: str

    @classmethod
    def of(cls, choice: Choice, calls: int | None) -> ChatChoice:
        """At most `calls` calls of tools are told."""
        told = [
            ToolCallMessage(id=call.id, function=FunctionCall(name=call.name, arguments=call.arguments))
            for call in choice.tool_calls[:calls]
        ]
        message = AnswerMessage(
            content=choice.text if choice.text or not told else None,
            reasoning_content=choice.reasoning or UNSET,
            tool_calls=told or UNSET,
        )
        return cls(
            index=choice.index,
            message=message,
            logprobs=Logprobs.of(choice.logprobs),
            finish_reason=choice.finish_reason,
        )


class ChatCompletion(msgspec.Struct, kw_only=True):
    """All answers, whole."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class FunctionDelta(msgspec.Struct, kw_only=True):
    name: str | UnsetType = UNSET
    arguments: str


class CallDelta(msgspec.Struct, kw_only=True):
    """News of call number `index`: `id` and `name` come first, then `arguments` bit by bit."""

    index: int
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET
    function: FunctionDelta

    @classmethod
    def of(cls, delta: ToolCallDelta) -> CallDelta:
        return cls(
            index=delta.index,
            id=delta.id or UNSET,
            type="function" if delta.id else UNSET,
            function=FunctionDelta(name=delta.name or UNSET, arguments=delta.arguments),
        )


class Delta(msgspec.Struct, kw_only=True):
    """What an event adds to an answer."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[CallDelta] | UnsetType = UNSET

    @classmethod
    def of(cls, piece: Piece, calls: int | None) -> Delta | None:
        """None when the piece adds nothing that is shown."""
        told = [CallDelta.of(call) for call in piece.tool_calls if calls is None or call.index < calls]
        if not (piece.text or piece.reasoning or told or piece.logprobs):
            return None
        return cls(content=piece.text or UNSET, reasoning_content=piece.reasoning or UNSET, tool_calls=told or UNSET)


class ChunkChoice(msgspec.Struct, kw_only=True):
    """`finish_reason` comes in an answer's last event."""

    index: int
    delta: Delta
    logprobs: Logprobs | None = None
    finish_reason: str | None = None


class ChatChunk(msgspec.Struct, kw_only=True):
    """An event of a stream. `usage` is there in streams that include it, and null but in the last event."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | UnsetType | None = UNSET

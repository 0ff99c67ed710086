"""The fields of /v1/messages, asked and answered, in Anthropic's shape."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from ringlm.frontend.server.chat_schema import ContentPart
from ringlm.frontend.server.schemas import Count, Id, Name, OfModel, Short, Text, Variables


class ContentBlock(msgspec.Struct, kw_only=True):
    """A text, thinking, tool_use with its id, name and input, or a tool_result with its tool_use_id and content."""

    type: Short
    text: str | None = None
    thinking: str | None = None
    id: Id | None = None
    name: Name | None = None
    input: dict[str, Any] | None = None
    tool_use_id: Id | None = None
    content: str | list[ContentPart] | None = None


class MessageTurn(msgspec.Struct, kw_only=True):
    """One turn of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: str | list[ContentBlock]


class MessagesTool(msgspec.Struct, kw_only=True):
    """A tool of the caller's; `input_schema` is a JSON Schema of its input. Tools of a `type` other than custom would
    be Anthropic's: they are not offered to the model."""

    type: Short | None = None
    name: Name
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None


class ToolChoice(msgspec.Struct, kw_only=True):
    """Whether the model may, must or must not call; `name` is that of a tool."""

    type: Literal["auto", "any", "tool", "none"]
    name: Name | None = None
    disable_parallel_tool_use: Annotated[bool | None, Meta(description="true: of several calls the first is told.")] = (
        None
    )


class Thinking(msgspec.Struct, kw_only=True):
    """Disabled or not: enable_thinking for the chat template. A budget is ignored."""

    type: Short


class OutputFormat(msgspec.Struct, kw_only=True):
    """What the text of an answer must be."""

    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(msgspec.Struct, kw_only=True):
    """`effort` reaches the chat template as reasoning_effort."""

    effort: Short | None = None
    format: OutputFormat | None = None


class CountTokensRequest(OfModel, kw_only=True):
    """A conversation."""

    messages: Annotated[list[MessageTurn], Meta(min_length=1, max_length=4096)]
    system: str | list[ContentPart] | None = None
    tools: Annotated[list[MessagesTool], Meta(max_length=128)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    chat_template_kwargs: Variables = None


class MessagesRequest(CountTokensRequest, kw_only=True):
    """The next turn of a conversation."""

    max_tokens: Annotated[Count, Meta(description="The longest answer, thinking included.")]
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_k: Annotated[int, Meta(ge=-1, lt=1 << 31)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    stop_sequences: Annotated[
        Annotated[list[Text], Meta(max_length=64)] | None,
        Meta(description="Texts that end an answer and are no part of it."),
    ] = None
    stream: bool | None = None


class TextBlock(msgspec.Struct, kw_only=True, tag_field="type", tag="text"):
    text: str
    citations: None = None


class ThinkingBlock(msgspec.Struct, kw_only=True, tag_field="type", tag="thinking"):
    """What the model thinks, as it is. Clients give a block back only if it is signed, so it is, with a fixed word."""

    thinking: str
    signature: str


class ToolUseBlock(msgspec.Struct, kw_only=True, tag_field="type", tag="tool_use"):
    """A call of one of the caller's tools. Where the model's input is no JSON object, as of one that was cut off, it is
    empty; a stream has it as the model wrote it."""

    id: str
    name: str
    input: dict[str, Any]


Block = TextBlock | ThinkingBlock | ToolUseBlock
Stop = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class MessagesUsage(msgspec.Struct, kw_only=True):
    """Counts of tokens; those of the prompt that were found in the prefix cache are apart."""

    input_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int = 0
    output_tokens: int


class MessageObject(msgspec.Struct, kw_only=True):
    """An answer."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[Block]
    stop_reason: Stop | None = None
    stop_sequence: str | None = None
    usage: MessagesUsage


class MessageDelta(msgspec.Struct, kw_only=True):
    """What an event adds to a block, of which `type` tells, or to the message."""

    type: Literal["text_delta", "thinking_delta", "signature_delta", "input_json_delta"] | UnsetType = UNSET
    text: str | UnsetType = UNSET
    thinking: str | UnsetType = UNSET
    signature: str | UnsetType = UNSET
    partial_json: str | UnsetType = UNSET
    stop_reason: Stop | UnsetType | None = UNSET
    stop_sequence: str | UnsetType | None = UNSET


class MessageEvent(msgspec.Struct, kw_only=True):
    """An event of a stream; `type` says which of the fields it has."""

    type: Literal[
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
        "ping",
    ]
    message: MessageObject | UnsetType = UNSET
    index: int | UnsetType = UNSET
    content_block: Block | UnsetType = UNSET
    delta: MessageDelta | UnsetType = UNSET
    usage: MessagesUsage | UnsetType = UNSET


class TokenCount(msgspec.Struct):
    """How many tokens a conversation has, in the chat template."""

    input_tokens: int

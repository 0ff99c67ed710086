"""From a request of Anthropic's Messages to a conversation's turn: content blocks to messages, tools to functions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from ringlm.frontend.server.errors import APIError
from ringlm.frontend.server.messages_schema import ContentBlock, CountTokensRequest, MessageTurn
from ringlm.frontend.server.turns import Turn, function, joined, one_system

# Claude Code begins with it, in every request another; no prompt would be found in the cache.
_BILLING = "x-anthropic-billing-header:"


def turn(asked: CountTokensRequest, **more: Any) -> Turn:
    """The next turn, in `more` fields of /v1/chat/completions. Raises APIError."""
    messages = [each for index, said in enumerate(asked.messages) for each in _said(said, f"messages[{index}]")]
    system = asked.system
    if isinstance(system, list):
        system = joined([part for part in system if not (part.text or "").startswith(_BILLING)], "system", "\n")
    choice, output = asked.tool_choice, asked.output_config
    variables: dict[str, Any] = {}
    if asked.thinking is not None:
        variables["enable_thinking"] = asked.thinking.type != "disabled"
    if output is not None and output.effort is not None:
        variables["reasoning_effort"] = output.effort
    form = None if output is None or output.format is None else output.format
    named: Any = {"auto": "auto", "any": "required", "none": "none"}
    if choice is not None and choice.type == "tool":
        if choice.name is None:
            raise APIError(400, "tool_choice of type tool needs the name of one.", param="tool_choice")
        named["tool"] = {"type": "function", "function": {"name": choice.name}}
    return Turn.translated(
        {
            "messages": one_system(system, messages),
            "tools": [
                function(tool.name, description=tool.description, parameters=tool.input_schema, strict=tool.strict)
                for tool in asked.tools or ()
                if tool.type in (None, "custom")
            ],
            "tool_choice": None if choice is None else named[choice.type],
            "parallel_tool_calls": not (choice is not None and choice.disable_parallel_tool_use),
            "response_format": form and {"type": form.type, "json_schema": {"name": "answer", "schema": form.schema}},
            "chat_template_kwargs": variables | (asked.chat_template_kwargs or {}),
            **more,
        }
    )


def _said(said: MessageTurn, where: str) -> Iterator[dict[str, Any]]:
    """One turn is a message, after one for each result of a tool."""
    content = [ContentBlock(type="text", text=said.content)] if isinstance(said.content, str) else said.content
    texts, thoughts, calls = [], [], []
    for block in content:
        match block:
            case ContentBlock(type="thinking", thinking=str(thought)):
                thoughts.append(thought)
            case ContentBlock(type="redacted_thinking"):  # another server's, which nobody here can read
                pass
            case ContentBlock(type="tool_use", id=str(call), name=str(name), input=dict(given)):
                function = {"name": name, "arguments": msgspec.json.encode(given).decode()}
                calls.append({"id": call, "type": "function", "function": function})
            case ContentBlock(type="tool_result", tool_use_id=str(call)):
                result = joined(block.content, where, "\n", of_tool=True)
                yield {"role": "tool", "tool_call_id": call, "content": result}
            case ContentBlock(type="thinking" | "tool_use" | "tool_result"):
                raise APIError(400, f"{where}: a block of type {block.type!r} lacks a field.", param="messages")
            case _:
                texts.append(block)
    message: dict[str, Any] = {"role": said.role}
    if texts:
        message["content"] = joined(texts, where, "\n")
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    if len(message) > 1:
        yield message

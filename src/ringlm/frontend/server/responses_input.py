"""From a request of OpenAI's Responses to a conversation's turn: items to messages, tools to functions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import msgspec

from ringlm.frontend.server.errors import APIError
from ringlm.frontend.server.responses_schema import InputItem, InputRequest, ResponsesTool
from ringlm.frontend.server.turns import Turn, function, joined, one_system


class Offered(NamedTuple):
    """A function as its caller knows it."""

    namespace: str | None
    tool: ResponsesTool


def offered(tools: Iterable[ResponsesTool] | None) -> dict[str, Offered]:
    """The functions by the names that the model sees; coding agents put some of theirs into namespaces. Other tools are
    left out: agents declare those of OpenAI's servers too, wherever they ask."""
    found = {}
    for index, tool in enumerate(tools or ()):
        inner, namespace = (tool.tools or (), tool.name) if tool.type == "namespace" else ([tool], None)
        for each in inner:
            if each.type == "function":
                if each.name is None:
                    raise APIError(400, f"tools[{index}]: a function needs a name.", param="tools")
                found[_full(namespace, each.name)] = Offered(namespace, each)
    return found


def turn(asked: InputRequest, items: Sequence[InputItem], tools: dict[str, Offered], **more: Any) -> Turn:
    """The turn after `items`, in `more` fields of /v1/chat/completions. Raises APIError."""
    messages = one_system(asked.instructions, _messages(items))
    if not messages:
        raise APIError(400, "input has no message; send one.", param="input")
    choice, tools = _choice(asked.tool_choice, tools)
    variables: dict[str, Any] = {}
    if asked.reasoning is not None and asked.reasoning.effort is not None:
        effort = asked.reasoning.effort
        variables = {"enable_thinking": False} if effort == "none" else {"reasoning_effort": effort}
    return Turn.translated(
        {
            "messages": messages,
            "tools": [
                function(name, description=tool.description, parameters=tool.parameters, strict=tool.strict)
                for name, (_, tool) in tools.items()
            ],
            "tool_choice": choice,
            "parallel_tool_calls": asked.parallel_tool_calls,
            "response_format": _format(asked),
            "chat_template_kwargs": variables | (asked.chat_template_kwargs or {}),
            **more,
        }
    )


def _messages(items: Sequence[InputItem]) -> list[dict[str, Any]]:
    """What the assistant has thought, said and called one after another is one message."""
    messages: list[dict[str, Any]] = []
    for index, item in enumerate(items):
        message = _message(item, f"input[{index}]")
        last = messages[-1] if messages and message["role"] == messages[-1]["role"] == "assistant" else None
        if last is not None and "tool_calls" in message:
            last["tool_calls"] = [*last.get("tool_calls", ()), *message["tool_calls"]]
        elif last is not None and "tool_calls" not in last and last.keys() & message.keys() == {"role"}:
            last |= message
        else:
            messages.append(message)
    return messages


def _message(item: InputItem, where: str) -> dict[str, Any]:
    match item:
        case InputItem(type="message", role=str(role)):
            return {"role": role, "content": joined(item.content, where)}
        case InputItem(type="reasoning"):
            return {"role": "assistant", "reasoning_content": joined(item.content or item.summary, where)}
        case InputItem(type="function_call", call_id=str(call), name=str(name), arguments=str(arguments)):
            function = {"name": _full(item.namespace, name), "arguments": arguments}
            return {"role": "assistant", "tool_calls": [{"id": call, "type": "function", "function": function}]}
        case InputItem(type="function_call_output", call_id=str(call)):
            return {"role": "tool", "tool_call_id": call, "content": joined(item.output, where, of_tool=True)}
    raise APIError(
        400,
        f"{where} is {item.type!r}, or lacks a field. There are message (role, content), function_call (call_id, name, "
        "arguments), function_call_output (call_id, output) and reasoning (content).",
        param="input",
    )


def _full(namespace: str | None, name: str) -> str:
    return f"{namespace.rstrip('_')}__{name}" if namespace else name


def _choice(choice: str | dict[str, Any] | None, tools: dict[str, Offered]) -> tuple[Any, dict[str, Offered]]:
    """As chat has it, and the tools that it leaves."""
    match choice:
        case None | str():
            return choice, tools
        case {"type": "function", "name": str(name)}:
            return {"type": "function", "function": {"name": _full(choice.get("namespace"), name)}}, tools
        case {"type": "allowed_tools", "mode": "auto" | "required" as mode, "tools": [*allowed]}:
            names = [each.get("name") for each in allowed if isinstance(each, dict)]
            return mode, {name: each for name, each in tools.items() if each.tool.name in names}
        case _:
            raise APIError(
                400, "tool_choice may be none, auto, required, a function or allowed_tools.", param="tool_choice"
            )


def _format(asked: InputRequest) -> dict[str, Any] | None:
    found = asked.text.format if asked.text is not None else None
    if found is None or found.type != "json_schema":
        return None if found is None else {"type": found.type}
    return {"type": found.type, "json_schema": msgspec.to_builtins(found)}

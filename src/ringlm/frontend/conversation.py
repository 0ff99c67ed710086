"""Messages and tools of the OpenAI API as chat templates take them. Knows their shape, no template."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, TypedDict

from ringlm.errors import RequestError

Message = Mapping[str, Any]  # {"role": …, "content": …}, as in the OpenAI API
Tool = Mapping[str, Any]  # {"type": "function", "function": {"name": …, "description": …, "parameters": …}}


Write: TypeAlias = Callable[[Sequence[tuple[str, Mapping[str, Any]]]], str]  # of calls, as the model writes them


class ChatOptions(TypedDict, total=False):
    """What `LLM.chat` takes beside the messages, for who checks types."""

    tools: Sequence[Tool]
    tool_choice: str | Mapping[str, Any]
    chat_template_kwargs: Mapping[str, Any] | None


def for_template(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Each message with a text for its content, and with objects for the arguments of its tool calls.

    Raises RequestError for content other than text, and for arguments that are no JSON object.
    """
    return [_for_template(message, f"messages[{index}]") for index, message in enumerate(messages)]


def variants(messages: Sequence[dict[str, Any]], write: Write | None) -> Iterator[list[dict[str, Any]]]:
    """What `for_template` made, as templates may want it, the likeliest first: earlier calls with arguments that are
    objects, or with JSON; all together, or each in a message of its own; with the thoughts before them, or without, as
    GPT-OSS's does where there is text; as a part of the text by `write`, where the template knows no calls. Then all of
    them with roles that alternate."""
    yield from _with_calls(messages, write)
    alternate = _alternating(messages)
    if alternate != messages:
        yield from _with_calls(alternate, write)


def shows_objects(messages: Sequence[dict[str, Any]], text: str) -> bool:
    """Whether a rendered text has Python's spelling of arguments, other than in contents: its template wants JSON."""
    calls = [call for message in messages for call in message.get("tool_calls", ())]
    spelled = {str(given) for call in calls if isinstance(given := call["function"]["arguments"], dict) and given}
    contents = "\n".join(message["content"] for message in messages)
    return any(text.count(spelling) > contents.count(spelling) for spelling in spelled)


def without_last_calls(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same with a call less in each message that has any: rendered as the same text, they are of no account."""
    less = []
    for message in messages:
        plain = {key: value for key, value in message.items() if key != "tool_calls"}
        calls = message.get("tool_calls", ())[:-1]
        less.append({**plain, "tool_calls": calls} if calls else plain)
    return less


def one_call_each(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same with no more than one call a message, and its result after each: some templates take no others."""
    apart: list[dict[str, Any]] = []
    rest = list(messages)
    while rest:
        message = rest.pop(0)
        calls = message.get("tool_calls", ())
        if len(calls) < 2:
            apart.append(message)
            continue
        results = list(itertools.takewhile(lambda later: later.get("role") == "tool", rest))
        del rest[: len(results)]
        for index, call in enumerate(calls):
            apart.append(message | {"tool_calls": [call]} | ({"content": ""} if index else {}))
            apart += [result for result in results if result.get("tool_call_id") == call.get("id")]
        ids = {call.get("id") for call in calls}
        apart += [result for result in results if result.get("tool_call_id") not in ids]
    return apart


def with_tools_inside(messages: Sequence[dict[str, Any]], tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """The same with the tools as JSON in the system message, where Phi-4-mini's template looks for them."""
    given = list(messages)
    if not (given and given[0].get("role") == "system"):
        given.insert(0, {"role": "system", "content": "You are a helpful assistant with some tools."})
    inside = json.dumps([tool["function"] for tool in tools], ensure_ascii=False)
    return [{**given[0], "tools": inside}, *given[1:]]


def schemas(tools: Sequence[Tool]) -> dict[str, Mapping[str, Any]]:
    """The JSON schema of each tool's arguments, by its name. Raises RequestError for what is no tool."""
    found = {}
    for index, tool in enumerate(tools):
        match tool:
            case {"type": "function", "function": {"name": str(name)} as function} if name:
                found[name] = function.get("parameters") or {}
            case _:
                raise RequestError(
                    f'tools[{index}] is no function; a tool is {{"type": "function", "function": '
                    '{"name": …, "description": …, "parameters": …}}.'
                )
        if not isinstance(found[name], Mapping):
            raise RequestError(f"tools[{index}]: its parameters are {found[name]!r:.80}; they must be a JSON schema.")
    return found


def _for_template(message: Message, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(f'{where} is {message!r:.80}; a message is {{"role": …, "content": …}}.')
    plain = {**message, "content": _text(message.get("content"), where)}
    calls = plain.pop("tool_calls", None)  # templates ask whether it is there, not what is in it
    if calls:
        plain["tool_calls"] = [_with_object(call, where) for call in calls]
    return plain


def _with_calls(messages: Sequence[dict[str, Any]], write: Write | None) -> Iterator[list[dict[str, Any]]]:
    if not any("tool_calls" in message for message in messages):
        yield list(messages)
        return
    for thoughtful in (list(messages), [_without_thoughts(message) for message in messages]):
        for apart in (thoughtful, one_call_each(thoughtful)):
            yield apart
            yield [_with_json(message) for message in apart]
    if write is not None:
        yield [_with_text(message, write) for message in messages]


def _alternating(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same with one system message, at the beginning, and one of the user's at a time: some templates take no
    others, and agents send them."""
    taken: list[dict[str, Any]] = []
    for message in messages:
        before = taken[-1] if taken else {}
        if message.get("role") == "system" and before.get("role", "system") != "system":
            message = {**message, "role": "user"}
        if message.get("role") in ("system", "user") and message.get("role") == before.get("role"):
            taken[-1] = {**before, "content": f"{before['content']}\n\n{message['content']}"}
        else:
            taken.append(message)
    return taken


def _without_thoughts(message: dict[str, Any]) -> dict[str, Any]:
    thoughts = {"reasoning_content", "reasoning", "thinking"} if "tool_calls" in message and message["content"] else ()
    return {key: value for key, value in message.items() if key not in thoughts}


def _with_json(message: dict[str, Any]) -> dict[str, Any]:
    if "tool_calls" not in message:
        return message
    calls = [
        {**call, "function": {**call["function"], "arguments": call["function"]["arguments"].text}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def _with_text(message: dict[str, Any], write: Write) -> dict[str, Any]:
    if "tool_calls" not in message:
        return message
    functions = [call["function"] for call in message["tool_calls"]]
    written = write([(function["name"], function["arguments"]) for function in functions])
    plain = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**plain, "content": message["content"] + written}


def _text(content: Any, where: str) -> str:
    if content is None:  # beside tool calls
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise RequestError(f"{where}: content is {content!r:.80}; it must be a text, or a list of parts of it.")
    return "".join(_part(part, where) for part in content)


def _part(part: Any, where: str) -> str:
    match part:
        case {"type": "text", "text": str(text)}:
            return text
        case {"type": kind} if kind != "text":
            raise RequestError(f"{where}: content of type {kind!r} cannot be read here; give parts of type 'text'.")
        case _:
            raise RequestError(f'{where}: a part is {part!r:.80}; it must be {{"type": "text", "text": …}}.')


def _with_object(call: Any, where: str) -> dict[str, Any]:
    match call:
        case {"function": {"name": str(), "arguments": arguments} as function}:
            pass
        case _:
            raise RequestError(f"{where}: a tool call is {call!r:.80}; it needs a function with a name and arguments.")
    text = arguments if isinstance(arguments, str) else ""
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError, RecursionError):  # refused below, as it is
            arguments = json.loads(arguments or "{}")
    if not isinstance(arguments, Mapping):
        raise RequestError(f"{where}: the arguments of a tool call are {arguments!r:.80}; they must be a JSON object.")
    return {"type": "function", **call, "function": {**function, "arguments": _Arguments(arguments, text)}}


class _Arguments(dict[str, Any]):
    """The object, and the JSON that it came as: the model's own, whose tokens are in the cache."""

    def __init__(self, arguments: Mapping[str, Any], text: str) -> None:
        super().__init__(arguments)
        self.text = text or json.dumps(self, ensure_ascii=False)

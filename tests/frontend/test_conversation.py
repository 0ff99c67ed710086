"""Messages and tools of the OpenAI API as templates take them, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from ringlm.errors import RequestError
from ringlm.frontend.conversation import for_template, one_call_each, schemas


def calling(arguments: Any) -> dict[str, Any]:
    function = {"name": "now", "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"id": "a", "type": "function", "function": function}]}


def test_messages() -> None:
    parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": " you"}]
    user, call, empty, answer, plain = for_template(
        [
            {"role": "user", "content": parts},
            calling('{"zone": ["UTC"]}'),
            calling(""),
            {"role": "tool", "tool_call_id": "a", "content": "12:00"},
            {"role": "assistant", "content": "Noon.", "tool_calls": [], "reasoning_content": "Hm."},
        ]
    )
    assert user == {"role": "user", "content": "Hi you"}
    function = {"name": "now", "arguments": {"zone": ["UTC"]}}
    assert call == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "a", "type": "function", "function": function}],
    }
    assert empty["tool_calls"][0]["function"]["arguments"] == {}
    assert for_template([call])[0] == call
    assert answer == {"role": "tool", "tool_call_id": "a", "content": "12:00"}
    assert plain == {"role": "assistant", "content": "Noon.", "reasoning_content": "Hm."}


def test_one_call_each() -> None:
    def call(*names: str) -> dict[str, Any]:
        return {"role": "assistant", "content": "", "tool_calls": [{"id": name} for name in names]}

    def result(name: str) -> dict[str, Any]:
        return {"role": "tool", "tool_call_id": name}

    user = {"role": "user", "content": "Hi"}
    mixed = [user, call("a", "b") | {"content": "Hm."}, result("b"), result("a"), result("?"), call("c"), result("c")]
    assert one_call_each(mixed) == [
        user,
        call("a") | {"content": "Hm."},
        result("a"),
        call("b"),
        result("b"),
        result("?"),
        call("c"),
        result("c"),
    ]
    assert one_call_each([user, call("a"), result("a")]) == [user, call("a"), result("a")]


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("Hi", r"messages\[1\] is 'Hi'; a message is"),
        ({"role": "user", "content": 7}, "content is 7"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "type 'image_url' cannot be read"),
        ({"role": "user", "content": ["Hi"]}, "a part is 'Hi'"),
        ({"role": "user", "content": [{"type": "text"}]}, r"a part is \{'type': 'text'\}"),
        ({"role": "assistant", "tool_calls": [{"name": "now"}]}, "needs a function with a name"),
        (calling("{"), r"arguments of a tool call are '\{'; they must be a JSON object"),
        (calling("[]"), r"arguments of a tool call are \[\]"),
        (calling("[" * 100_000), "they must be a JSON object"),
    ],
)
def test_messages_that_are_refused(message: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        for_template([{"role": "user", "content": "Hi"}, message])


def test_tools() -> None:
    tool = {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}
    bare = {"type": "function", "function": {"name": "bare"}}
    assert schemas([tool, bare]) == {"now": {"type": "object"}, "bare": {}}
    for wrong in ({"type": "web_search"}, {"type": "function", "function": {"name": ""}}, {"name": "now"}, "now"):
        with pytest.raises(RequestError, match=r"tools\[1\] is no function"):
            schemas([tool, wrong])  # type: ignore[list-item]
    with pytest.raises(RequestError, match=r"its parameters are 7; they must be a JSON schema"):
        schemas([{"type": "function", "function": {"name": "now", "parameters": 7}}])

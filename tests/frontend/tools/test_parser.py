"""Answers told apart: every format, whole and broken, and the same however the stream is cut."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringlm.frontend.tools import formats
from ringlm.frontend.tools.formats import Reasoning
from ringlm.frontend.tools.parser import AnswerParser
from tests.frontend.tools.reading import TOOLS, Told, read

THINK = Reasoning("<think>", "</think>")
FORMATS = {name: formats.chosen_format(name) for name in ("hermes", "llama", "mistral", "pythonic", "qwen_coder")}


def call(name: str, arguments: str, key: str = "arguments") -> str:
    return f'{{"name": "{name}", "{key}": {arguments}}}'


def tag(inside: str) -> str:
    return f"<tool_call>\n{inside}\n</tool_call>"


def coded(name: str, **values: str) -> str:
    inside = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<tool_call>\n<function={name}>\n{inside}</function>\n</tool_call>"


CODE = '\n    print("<a> \\n é")\n\n'
PARIS = '{"city": "Paris"}'
HARD = r'{"a": {"b": [{}, "}]\"\\"], "c": "<tool_call>"}, "é😀": -1.5e3,' + '\n "n": null }'
ONE = (("weather", PARIS),)

CASES: dict[str, tuple[str, str, Told]] = {
    # Hermes
    "hermes": ("hermes", tag(call("weather", PARIS)), Told("", ONE, True)),
    "hermes, hard arguments": ("hermes", tag(call("now", HARD)), Told("", (("now", HARD),), True)),
    "hermes, text around": (
        "hermes",
        f"Let me see.\n\n{tag(call('weather', PARIS))}\nDone. \n",
        Told("Let me see.\nDone. \n", ONE, True),
    ),
    "hermes, several": (
        "hermes",
        f"{tag(call('weather', PARIS))}\n{tag(call('now', '{}'))}{tag(call('now', '{ }'))}\n",
        Told("", (*ONE, ("now", "{}"), ("now", "{ }")), True),
    ),
    "hermes, arguments first": (
        "hermes",
        tag(r'{ "arguments" :{"x": 1} , "id": "\"\\", "name" : "now"}'),
        Told("", (("now", '{"x": 1}'),), True),
    ),
    "hermes, escapes in the name": ("hermes", tag(call(r"n\u006fw", "{}")), Told("", (("now", "{}"),), True)),
    "hermes, no arguments": ("hermes", tag('{"name": "now"}'), Told("", (("now", "{}"),), True)),
    "hermes, no closing tag": ("hermes", "<tool_call>" + call("weather", PARIS), Told("", ONE, True)),
    # Told no call: text, to the character
    **{
        f"no call: {broken}": ("hermes", broken, Told(broken))
        for broken in (
            "a < b, <tool> and <tool_call",
            " <tool_call>\n",
            "One \n<tool_call> two </tool_call> ",
            tag(call("unknown", PARIS)),
            tag(call("weather", '"Paris"')),
            tag(call("weather", "{'city': 1}")),
            tag(call("weather", "{ x")),
            tag('{"arguments": {"a": 1}}'),
            tag('{"arguments": {"a": 1}, "name": "unknown"}'),
            tag('{"name": "now", "name": "now"}'),
            tag('{"name": "now", "more": 1}'),
            tag('{"name": "now\n", "arguments": {}}'),
            tag('{"name": 7, "arguments": {}}'),
            tag("{}"),
            tag("[]"),
            '<tool_call>{"name": "weather"',
            '<tool_call>{"name": "weather", "argu',
            '<tool_call>{"name": "wea',
        )
    },
    "hermes, a call within a broken one": (
        "hermes",
        f"<tool_call> no {tag(call('weather', PARIS))}",
        Told("<tool_call> no", ONE, True),
    ),
    # Told in part: what was told stays, the rest is text, and it does not count as a call
    "hermes, ends in the arguments": (
        "hermes",
        '<tool_call>{"name": "weather", "arguments": {"city": "Par',
        Told("", (("weather", '{"city": "Par'),)),
    ),
    "hermes, brackets that do not match": (
        "hermes",
        tag(call("weather", '{"city": [1}')) + "!",
        Told("}}\n</tool_call>!", (("weather", '{"city": [1'),)),
    ),
    "hermes, arguments that are no JSON": (
        "hermes",
        tag(call("weather", '{"city" 1}')),
        Told("}\n</tool_call>", (("weather", '{"city" 1}'),)),
    ),
    "hermes, never closed": ("hermes", '<tool_call>{"name": "now", "arguments": {} ', Told("", (("now", "{}"),))),
    "hermes, one whole and one broken": (
        "hermes",
        f'{tag(call("weather", PARIS))}<tool_call>{{"name": "now", "arguments": {{"',
        Told("", (*ONE, ("now", '{"'))),
    ),
    "hermes, one whole and one that is text": (
        "hermes",
        f"{tag(call('weather', PARIS))}\n{tag(call('unknown', '{}'))}",
        Told(tag(call("unknown", "{}")), ONE, True),
    ),
    # Llama
    "llama": ("llama", call("weather", PARIS, "parameters"), Told("", ONE, True)),
    "llama, hard arguments": ("llama", call("now", HARD, "parameters"), Told("", (("now", HARD),), True)),
    "llama, tag": ("llama", "<|python_tag|>" + call("weather", PARIS, "parameters"), Told("", ONE, True)),
    "llama, text and tag": ("llama", f"So: <|python_tag|>{call('weather', PARIS)}", Told("So:", ONE, True)),
    "llama, several": (
        "llama",
        f"\n{call('weather', PARIS)}; {call('now', '{}')}\n{call('now', '{}')} ",
        Told("", (*ONE, ("now", "{}"), ("now", "{}")), True),
    ),
    "llama, a type": ("llama", '{"type": "function", ' + call("weather", PARIS)[1:], Told("", ONE, True)),
    "llama, text after": ("llama", f"{call('weather', PARIS)}; and more", Told("; and more", ONE, True)),
    "llama, JSON that is no call": ("llama", '{"title": "now", "name": 1}', Told('{"title": "now", "name": 1}')),
    "llama, JSON in text": ("llama", f"I write {call('now', '{}')}", Told(f"I write {call('now', '{}')}")),
    "llama, another tool": ("llama", call("unknown", "{}"), Told(call("unknown", "{}"))),
    "llama, code": ("llama", '<|python_tag|>print("hi")', Told('<|python_tag|>print("hi")')),
    # Mistral
    "mistral, a list": ("mistral", f"[TOOL_CALLS] [{call('weather', PARIS)}]", Told("", ONE, True)),
    "mistral, a list of two": (
        "mistral",
        f'Hm. [TOOL_CALLS][{{"id": "abc", {call("weather", PARIS)[1:]}, {call("now", HARD)}]',
        Told("Hm.", (*ONE, ("now", HARD)), True),
    ),
    "mistral, a list that breaks": (
        "mistral",
        f"[TOOL_CALLS][{call('weather', PARIS)}, {call('unknown', PARIS)}]",
        Told(f", {call('unknown', PARIS)}]", ONE, True),
    ),
    "mistral, an empty list": ("mistral", "[TOOL_CALLS][]", Told("[TOOL_CALLS][]")),
    "mistral, names": (
        "mistral",
        f"[TOOL_CALLS]weather[ARGS]{PARIS}[TOOL_CALLS]weather_in[CALL_ID]123456789[ARGS]{HARD}",
        Told("", (*ONE, ("weather_in", HARD)), True),
    ),
    "mistral, another name": ("mistral", "[TOOL_CALLS]weather_on[ARGS]{}", Told("[TOOL_CALLS]weather_on[ARGS]{}")),
    "mistral, a name alone": ("mistral", "[TOOL_CALLS]weather", Told("[TOOL_CALLS]weather")),
    # Python's calls
    "pythonic": ("pythonic", '[weather(city="Paris")]', Told("", ONE, True)),
    "pythonic, several": (
        "pythonic",
        """ [weather_in(a=[1, -2.5, 'it\\'s )]'], b={"c": (True, null)}, d=None), now( ), now()] """,
        Told(
            "",
            (
                ("weather_in", """{"a": [1, -2.5, "it's )]"], "b": {"c": [true, null]}, "d": null}"""),
                ("now", "{}"),
                ("now", "{}"),
            ),
            True,
        ),
    ),
    **{
        f"no call in Python: {broken}": ("pythonic", broken, Told(broken))
        for broken in (
            "[1, 2]",
            "[unknown()]",
            "[weather]",
            "[weather(city=",
            "[weather('Paris')]",
            "[weather(**a)]",
            "[weather(city=now())]",
            "[weather(n=1e999)]",
            "[weather(n={1: 2})]",
            "[weather(n={1, 2})]",
            "[weather(n=b'')]",
            "[weather(city=[)]",
            "[weather(city=1 1)]",
        )
    },
    # Qwen3-Coder
    "coder": ("qwen_coder", f"So:\n{coded('weather', city='Paris')}\n", Told("So:", ONE, True)),
    "coder, several": (
        "qwen_coder",
        f"{coded('now')}\n<function=now></function><tool_call><function=weather><parameter=city>Paris</parameter></function>",
        Told("", (("now", "{}"), ("now", "{}"), *ONE), True),
    ),
    "coder, types": (
        "qwen_coder",
        coded("write", text=CODE, count="-1.5e3", any="None", either="7", wrong="[1]", more="true"),
        Told(
            "",
            (
                (
                    "write",
                    f'{{"text": {json.dumps(CODE, ensure_ascii=False)}, "count": -1.5e3, "any": null, '
                    '"either": "7", "wrong": "[1]", "more": "true"}',
                ),
            ),
            True,
        ),
    ),
    "coder, values that fit no type": (
        "qwen_coder",
        coded("write", count="a few", any="[1, {}]"),
        Told("", (("write", '{"count": "a few", "any": [1, {}]}'),), True),
    ),
    "coder, an unknown tool": ("qwen_coder", coded("unknown", a="1"), Told(coded("unknown", a="1"))),
    "coder, a name that goes on": ("qwen_coder", "<function=weather!>", Told("<function=weather!>")),
    "coder, ends in a text": (
        "qwen_coder",
        "<tool_call><function=write><parameter=text>a\n\n",
        Told("", (("write", '{"text": "a\\n'),)),
    ),
    "coder, ends in a number": (
        "qwen_coder",
        "<tool_call><function=write><parameter=count>\n17",
        Told("17", (("write", '{"count": '),)),
    ),
    "coder, no more parameters": (
        "qwen_coder",
        "<function=write><parameter=count>1</parameter>?</function>",
        Told("?</function>", (("write", '{"count": 1'),)),
    ),
    "pythonic, one and a broken one": ("pythonic", "[now(), unknown()]", Told(", unknown()]", (("now", "{}"),), True)),
}

REASONING = {
    "opened by the model": (" <think>\nHm. \n</think>\n\nYes. ", False, Told("Yes. ", reasoning="Hm.")),
    "opened by the prompt": ("\nHm.\n\n</think>\n\nYes.", True, Told("Yes.", reasoning="Hm.")),
    "opened by both": ("<think>Hm.</think>Yes.", True, Told("Yes.", reasoning="Hm.")),
    "none": ("\nYes, <think> it.</think>", False, Told("\nYes, <think> it.</think>")),
    "empty": ("<think>\n\n</think>\n\nYes.", False, Told("Yes.")),
    "never closed": ("Hm. <thin </th", True, Told(reasoning="Hm. <thin </th")),
    "before a call": (
        f"<think>\nI'd write <tool_call>.\n</think>\n\n{tag(call('weather', PARIS))}",
        False,
        Told("", ONE, True, "I'd write <tool_call>."),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_format(case: str) -> None:
    name, answer, expected = CASES[case]
    for at in range(len(answer) + 1):
        assert read((answer[:at], answer[at:]), FORMATS[name], None) == expected
    assert read(answer, FORMATS[name], None) == expected


@pytest.mark.parametrize("case", REASONING)
def test_reasoning(case: str) -> None:
    answer, opened, expected = REASONING[case]
    for at in range(len(answer) + 1):
        assert read((answer[:at], answer[at:]), FORMATS["hermes"], THINK, opened) == expected
    assert read(answer, FORMATS["hermes"], THINK, opened) == expected
    if not expected.calls:
        assert read(answer, None, THINK, opened) == expected


def test_reasoning_before_a_bare_call() -> None:
    answer = f"[THINK]Hm.[/THINK]\n{call('weather', PARIS)}"
    assert read(answer, FORMATS["llama"], Reasoning("[THINK]", "[/THINK]")) == Told("", ONE, True, "Hm.")


@given(data=st.data(), case=st.sampled_from(sorted(CASES)))
def test_any_cuts(data: st.DataObject, case: str) -> None:
    name, answer, expected = CASES[case]
    cuts = sorted(data.draw(st.sets(st.integers(0, len(answer)))))
    pieces = [answer[start:end] for start, end in zip([0, *cuts], [*cuts, len(answer)], strict=True)]
    assert read(pieces, FORMATS[name], None) == expected


WORDS = [
    *("<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<think>", "</think>"),
    *("{", "}", "[", "]", "(", ")", '"', "'", "\\", ":", ",", ";", "=", " ", "\n", "1", "x", "é"),
    *('"name"', '"arguments"', '"weather"', "weather", "now", call("now", '{"a": 1}'), "now()", '{"name": "now", '),
    *(
        "<function=",
        "<parameter=",
        ">",
        "</parameter>",
        "</function>",
        "write",
        "count",
        "text",
        coded("write", text="a"),
    ),
]


@given(data=st.data(), name=st.sampled_from([*formats.NAMES, None]), reasoning=st.booleans(), opened=st.booleans())
def test_nonsense(data: st.DataObject, name: str | None, reasoning: bool, opened: bool) -> None:
    """Whole, in words and in characters it is the same; what has neither calls nor reasoning is text to the letter."""
    calling = None if name is None else formats.chosen_format(name)
    known = [*WORDS, *(calling.openings + calling.inner if calling else ())]
    words = data.draw(st.lists(st.sampled_from(known), max_size=20))
    answer = "".join(words)
    whole, *cut = (
        read(pieces, calling, THINK if reasoning else None, opened and reasoning)
        for pieces in ([answer], words, answer)
    )
    assert cut == [whole, whole]
    framed = calling is not None and calling.frames
    if not (whole.calls or framed or (reasoning and (opened or "<think>" in answer))):
        assert whole.text == answer
    if whole.called:
        assert all(isinstance(json.loads(arguments), dict) for _, arguments in whole.calls)


def test_arguments_stream() -> None:
    parser = AnswerParser(FORMATS["hermes"], TOOLS)
    assert parser.push('<tool_call>{"name": "weather", "arguments": ').tool_calls == ()
    (head,) = parser.push('{"ci').tool_calls
    assert (head.index, head.name, head.arguments) == (0, "weather", '{"ci')
    (more,) = parser.push("ty").tool_calls
    assert (more.id, more.name, more.arguments) == (None, None, "ty")
    assert not parser.called
    assert [delta.arguments for delta in parser.push('": 1}}</tool_call>').tool_calls] == ['": 1}']
    assert parser.called


def test_ids() -> None:
    for calling, answer, pattern in (
        (FORMATS["hermes"], tag(call("now", "{}")), r"call_[0-9a-f]{24}"),
        (FORMATS["mistral"], "[TOOL_CALLS]now[ARGS]{}", r"[0-9A-Za-z]{9}"),
    ):
        ids = {AnswerParser(calling, TOOLS).push(answer).tool_calls[0].id for _ in range(2)}
        assert len(ids) == 2
        assert all(re.fullmatch(pattern, found) for found in ids)

"""Calls that are enforced: whatever is drawn from a format's grammar, its parser reads as calls whose arguments
validate. Tokens are bytes, and words of formats, which are special tokens or not."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from jsonschema import Draft202012Validator

from ringlm.engine.grammar import Grammar, Grammars, Masks
from ringlm.errors import RequestError
from ringlm.frontend.conversation import schemas
from ringlm.frontend.grammar import Lark, after_reasoning
from ringlm.frontend.tools import enforcing, formats
from ringlm.frontend.tools.enforcing import Choice
from ringlm.frontend.tools.formats import Reasoning
from ringlm.frontend.tools.parser import AnswerParser

THINK = Reasoning("<think>", "</think>")
WORDS = """<tool_call> </tool_call> <|python_tag|> [TOOL_CALLS] [ARGS] </function> <|tool_call|> <think> </think>
<|start|> <|channel|> <|message|> <|constrain|> <|end|> <arg_key> </arg_value> <｜tool▁calls▁begin｜>
<｜tool▁call▁begin｜> <｜tool▁sep｜> <｜tool▁call▁end｜> <minimax:tool_call>""".split()  # noqa: SIM905
END = 256 + len(WORDS)
FORMATS = formats.NAMES


def tool(name: str, strict: bool | None = None, **parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, "strict": strict}}


WEATHER = tool(
    "weather",
    properties={
        "unit": {"type": "string", "enum": ["C", "F°"]},
        "days": {"$ref": "#/$defs/days"} | {"type": "integer"},
        "place": {
            "type": "object",
            "properties": {
                "lat": {"type": "number", "minimum": -90, "maximum": 90},
                "of": {"type": ["string", "number"], "maxLength": 3},
            },
            "required": ["lat"],
            "additionalProperties": False,
        },
        "on": {"type": ["boolean", "null"]},
    },
    required=["days", "place"],
    additionalProperties=False,
    **{"$defs": {"days": {"minimum": 1, "maximum": 10}}},
)
CLOCK = tool("clock", properties={}, additionalProperties=False)
STRICT = {**WEATHER, "function": WEATHER["function"] | {"strict": True}}


class Pen:
    """Writes what a grammar allows, at random."""

    def __init__(self, special: bool) -> None:
        words = [word.encode() for word in WORDS]
        self._grammars = Grammars(
            [bytes([byte]) for byte in range(256)] + words + [b"<end>"],
            list(range(256 if special else END, END + 1)),
            [END],
        )
        self._masks = Masks()
        self.ids = {word: 256 + index for index, word in enumerate(WORDS)} if special else {}

    def lark(self) -> Lark:
        return Lark(self.ids)

    def tokens(self, text: str) -> list[int]:
        """As a model writes it: special tokens where there are some."""
        parts = re.split("(" + "|".join(map(re.escape, self.ids)) + ")", text) if self.ids else [text]
        return [token for part in parts for token in ([self.ids[part]] if part in self.ids else part.encode())]

    def write(self, start: Callable[[Lark], str], draw: random.Random, first: Sequence[int] = ()) -> str | None:
        """A text of the grammar that begins with the tokens `first`; None if it takes too long."""
        lark = self.lark()
        grammar = self._grammars.compile(lark.text(start(lark)))
        written: list[int] = []
        while len(written) < 600:
            allowed = self._allowed(grammar)
            if len(written) < len(first):
                token = first[len(written)]
                assert token in allowed
            elif END in allowed and draw.random() < 0.5:
                token = END
            else:
                token = draw.choice(allowed)
            if token == END:
                return b"".join(bytes([t]) if t < 256 else WORDS[t - 256].encode() for t in written).decode()
            written.append(token)
            grammar.add(token)
        return None

    def _allowed(self, grammar: Grammar) -> list[int]:
        with self._masks.made([grammar]):
            pass
        assert grammar.error is None
        return np.flatnonzero(np.isfinite(grammar.masked(np.zeros(END + 1, np.float32)))).tolist()


@pytest.fixture(scope="module", params=[False, True], ids=["text", "special"])
def pen(request: pytest.FixtureRequest) -> Pen:
    return Pen(request.param)


def read(module: str, tools: list[Any], text: str, judged: str = "") -> tuple[str, list[tuple[str, Any]]]:
    """The text, and calls with their arguments, which must validate; those of the tool `judged` alone, if any."""
    parser = AnswerParser(formats.chosen_format(module), schemas(tools))
    parts = [parser.push(text), parser.finish()]
    calls: dict[int, list[str]] = {}
    for delta in (delta for part in parts for delta in part.tool_calls):
        calls.setdefault(delta.index, ["", ""])[0] += delta.name or ""
        calls[delta.index][1] += delta.arguments
    assert parser.called == bool(calls), text
    found = [(name, json.loads(arguments)) for name, arguments in calls.values()]
    for name, arguments in found:
        if judged in ("", name):
            Draft202012Validator(dict(schemas(tools)[name])).validate(arguments)
    return "".join(part.text for part in parts), found


def grammar(module: str, tools: list[Any], choice: Choice, text: str | None = None) -> Callable[[Lark], str]:
    calling = formats.chosen_format(module)
    return lambda lark: enforcing.call_grammar(lark, calling, tools, choice, text) or ""


@pytest.mark.parametrize("module", FORMATS)
def test_required_calls_validate(pen: Pen, module: str) -> None:
    several = set()
    for seed in range(12):
        text = pen.write(grammar(module, [WEATHER, CLOCK], Choice(required=True)), random.Random(seed))
        if text is not None:
            said, calls = read(module, [WEATHER, CLOCK], text)
            assert not said
            assert calls
            several.add(len(calls))
    assert max(several) > 1 or module == "harmony"
    for seed in range(4):
        text = pen.write(grammar(module, [WEATHER, CLOCK], Choice.of("required", False)), random.Random(seed))
        assert text is None or len(read(module, [WEATHER, CLOCK], text)[1]) == 1


@pytest.mark.parametrize("module", FORMATS)
def test_a_named_tool_is_the_one_that_is_called(pen: Pen, module: str) -> None:
    choice = Choice.of({"type": "function", "function": {"name": "clock"}})
    text = pen.write(grammar(module, [WEATHER, CLOCK], choice), random.Random(1))
    assert read(module, [WEATHER, CLOCK], text or "") == ("", [("clock", {})])


@pytest.mark.parametrize("module", FORMATS)
def test_calls_of_strict_tools_validate_among_text(pen: Pen, module: str) -> None:
    start = grammar(module, [STRICT, CLOCK], Choice())
    calling = formats.chosen_format(module)
    before = b"" if calling.bare else b"Well, < and [: "
    begun = pen.tokens(calling.head or calling.first)
    found = 0
    for seed in range(6):
        text = pen.write(start, random.Random(seed), [*before, *begun])
        if text is not None:
            said, calls = read(module, [STRICT, CLOCK], text, judged="weather")
            assert said.startswith(before.decode().rstrip())
            found += len(calls)
    assert found
    plain = pen.tokens(calling.response + "No {call} or [call]().")
    assert "No {call} or" in (pen.write(start, random.Random(0), plain) or "")


def test_an_answer_of_a_prescribed_shape_may_be_a_call_instead(pen: Pen) -> None:
    def start(lark: Lark) -> str:
        text = lark.json({"enum": [1, 2]}, "it")
        return enforcing.call_grammar(lark, formats.chosen_format("hermes"), [CLOCK], Choice(), text) or ""

    answers = [read("hermes", [CLOCK], pen.write(start, random.Random(seed)) or "", "none") for seed in range(20)]
    assert {said for said, calls in answers if not calls} >= {"1", "2"}
    assert any(calls for _, calls in answers)


@pytest.mark.parametrize("opened", [False, True])
def test_reasoning_comes_first(pen: Pen, opened: bool) -> None:
    def start(lark: Lark) -> str:
        return after_reasoning(lark, THINK, opened, lark.rule('"yes"'))

    thought = pen.tokens(("" if opened else "<think>") + "yes? {</think>")
    text = pen.write(start, random.Random(0), thought)
    assert text is not None
    assert text.endswith("yes")
    assert "yes? {</think>" in text
    assert opened or pen.write(start, random.Random(0), pen.tokens("yes")) == "yes"


def test_without_strict_tools_anything_may_be_written() -> None:
    assert grammar("hermes", [WEATHER, CLOCK], Choice())(Lark({})) == ""


@pytest.mark.parametrize(
    ("module", "tools", "choice", "why"),
    [
        ("hermes", [CLOCK], Choice(required=True, name="no"), "names 'no', which is none of the tools"),
        ("hermes", [tool("f", type="string")], Choice(required=True), "of type 'string'; they must be an object"),
        ("hermes", [tool("f", **{"not": {}})], Choice(required=True), "parameters of tool 'f', at #/not"),
        ("pythonic", [tool("f", anyOf=[{}])], Choice(required=True), "'anyOf' cannot be enforced in this"),
        ("pythonic", [tool("f", properties={"a-b": {}})], Choice(required=True), "'a-b' is no name in Python"),
        ("qwen_coder", [tool("f", required=["a"])], Choice(required=True), "'a' cannot be enforced in this"),
        ("qwen_coder", [tool("f", properties={"a": {"pattern": "b"}})], Choice(required=True), "argument 'a' of tool"),
        ("qwen_coder", [tool("f", properties={"a": {"enum": [1]}})], Choice(required=True), "needs its 'type'"),
    ],
)
def test_what_cannot_be_enforced_is_refused(module: str, tools: list[Any], choice: Choice, why: str) -> None:
    with pytest.raises(RequestError) as refused:
        grammar(module, tools, choice)(Lark({}))
    assert why in str(refused.value)


@pytest.mark.parametrize("choice", ["maybe", {"type": "function"}, {"type": "web_search"}])
def test_what_is_no_choice_is_refused(choice: Any) -> None:
    with pytest.raises(RequestError, match="tool_choice is"):
        Choice.of(choice)

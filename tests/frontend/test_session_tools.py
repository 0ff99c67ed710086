"""Tools and thoughts through a session: offered to the template, told apart in the answer, streamed and whole."""

from __future__ import annotations

import copy

import pytest

from ringlm.engine.request import SamplingParams
from ringlm.errors import RequestError
from ringlm.frontend.answer import ToolCall
from ringlm.frontend.session import Session
from ringlm.frontend.tokenizer import Tokenizer
from tests.frontend.fake import EOS, FakeEngine
from tests.frontend.tools import templates

GREEDY = SamplingParams(temperature=0)
USER = [{"role": "user", "content": "Paris?"}]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'


@pytest.fixture(scope="module")
def able(tokenizer: Tokenizer) -> Tokenizer:
    fast = copy.deepcopy(tokenizer._fast)
    fast.chat_template = templates.QWEN_THINKING
    return Tokenizer(fast, "able")


def saying(tokenizer: Tokenizer, text: str) -> tuple[FakeEngine, Session]:
    engine = FakeEngine(lambda _: [*tokenizer.encode(text), EOS])
    return engine, Session(engine, tokenizer)


def test_a_call_is_told_apart(able: Tokenizer) -> None:
    engine, session = saying(able, f"<think>Rain?</think>Let me look.{CALL}{CALL}")
    completion = session.chat(USER, GREEDY, tools=TOOLS).result()
    (choice,) = completion.choices
    assert (choice.reasoning, choice.text, choice.finish_reason) == ("Rain?", "Let me look.", "tool_calls")
    assert [(call.name, call.arguments) for call in choice.tool_calls] == [("weather", '{"city": "Paris"}')] * 2
    assert choice.tool_calls[0].id != choice.tool_calls[1].id
    assert '"name": "weather"' in able.decode(engine.submitted[1][0])
    # Streamed it is the same, the arguments bit by bit.
    pieces = list(session.chat(USER, GREEDY, tools=TOOLS).pieces())
    assert "".join(piece.text for piece in pieces) == choice.text
    assert "".join(piece.reasoning for piece in pieces) == choice.reasoning
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["tool_calls"]
    deltas = [delta for piece in pieces for delta in piece.tool_calls]
    assert [delta.name for delta in deltas if delta.name] == ["weather"] * 2
    assert "".join(delta.arguments for delta in deltas if delta.index == 1) == '{"city": "Paris"}'
    assert len(deltas) > 4


def test_an_answer_that_is_cut_off_is_no_call(able: Tokenizer) -> None:
    _, session = saying(able, CALL + " and more")
    whole = len(able.encode(CALL))
    (cut,) = session.chat(USER, GREEDY.replace(max_tokens=whole), tools=TOOLS).result().choices
    assert cut.finish_reason == "length"
    assert isinstance(cut.tool_calls[0], ToolCall)


def test_without_tools_a_call_is_text(able: Tokenizer) -> None:
    engine, session = saying(able, CALL)
    for generation in (session.chat(USER, GREEDY), session.chat(USER, GREEDY, tools=TOOLS, tool_choice="none")):
        completion = generation.result()
        assert (completion.text, completion.finish_reason) == (CALL, "stop")
    assert "weather" not in able.decode(engine.submitted[2][0])
    with pytest.raises(RequestError, match="not supported yet"):
        session.chat(USER, GREEDY, tools=TOOLS, tool_choice="required")


def test_variables_reach_the_template(able: Tokenizer) -> None:
    engine, session = saying(able, "Yes.")
    assert session.chat(USER, GREEDY, enable_thinking=False).result().text == "Yes."
    assert able.decode(engine.submitted[1][0]).endswith("<think>\n\n</think>\n\n")
    assert session.chat(USER, GREEDY).result().choices[0].reasoning == ""


def test_several_answers_have_parsers_of_their_own(able: Tokenizer) -> None:
    _, session = saying(able, f"<think>Hm.</think>{CALL}")
    choices = session.chat(USER, GREEDY.replace(n=3), tools=TOOLS).result().choices
    assert [(choice.reasoning, choice.finish_reason, len(choice.tool_calls)) for choice in choices] == [
        ("Hm.", "tool_calls", 1)
    ] * 3

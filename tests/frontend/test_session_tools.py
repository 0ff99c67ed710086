"""Tools and thoughts through a session: offered to the template, told apart in the answer, streamed and whole."""

from __future__ import annotations

import copy

import pytest
from llguidance import LLMatcher, LLTokenizer

from ringlm.engine.request import SamplingParams, StructuredOutputsParams
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
    with pytest.raises(RequestError, match="there are no tools"):
        session.chat(USER, GREEDY, tool_choice="required")


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


def test_what_the_engine_is_told_of_grammars(able: Tokenizer) -> None:
    """Nothing where anything may be written; what tokens stand for, once, and the same grammar for each answer."""
    engine, session = saying(able, CALL)
    session.chat(USER, GREEDY, tools=TOOLS).result()
    assert not hasattr(engine, "vocabulary")
    assert engine.submitted[1][1].structured_outputs is None
    session.chat(USER, GREEDY.replace(n=2), tools=TOOLS, tool_choice="required").result()
    tokens = engine.vocabulary.tokens
    assert len(tokens) == engine.ready.vocabulary
    assert [tokens[token] for token in able.encode("Hi, <b>")] == [b"Hi", b",", b" <", b"b", b">"]
    assert tokens[EOS] == b"<|im_end|>"
    assert EOS in engine.vocabulary.special
    assert EOS in engine.vocabulary.ends
    first, second = (engine.submitted[id][1].structured_outputs for id in (2, 3))
    assert first == second
    assert "<tool_call>" in str(first and first.grammar)
    del engine.vocabulary
    shape = StructuredOutputsParams(choice=["yes"])
    session.complete("So?", GREEDY.replace(structured_outputs=shape)).result()
    assert not hasattr(engine, "vocabulary")


def test_a_format_with_frames_has_them_around_a_prescribed_answer(tokenizer: Tokenizer) -> None:
    fast = copy.deepcopy(tokenizer._fast)
    fast.chat_template = "{{ messages }}<|channel|>analysis"
    engine, session = saying(Tokenizer(fast, "framed"), "1")
    shape = StructuredOutputsParams(json={"enum": [1, 2]})
    session.chat(USER, GREEDY.replace(structured_outputs=shape)).result()
    told = engine.submitted[1][1].structured_outputs
    matcher = LLMatcher(LLTokenizer("byte"), str(told and told.grammar))
    for thought in ("", "<|channel|>analysis<|message|>2 <|end|><|start|>assistant"):
        matcher.reset()
        answer = list(f"{thought}<|channel|>final<|message|>1".encode())
        assert matcher.try_consume_tokens(answer) == len(answer)
        assert matcher.is_accepting()
    matcher.reset()
    assert not matcher.try_consume_tokens(list(b"1"))

"""Answers of reasoning models and with calls of tools, whose parts a parser tells apart."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from ringlm.cluster.messages import Output
from ringlm.engine.request import StopReason
from ringlm.frontend.answer import ToolCall, ToolCallDelta
from ringlm.frontend.stops import StopStrings
from ringlm.frontend.tokenizer import Tokenizer
from ringlm.frontend.writer import Text, Writer, joined
from tests.frontend.fake import EOS


class Parsed(NamedTuple):
    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()


class Parser:
    """Takes [name:arguments] for a call, and what is before a | for reasoning."""

    def __init__(self) -> None:
        self.called = False
        self._held = ""

    def push(self, text: str) -> Parsed:
        self._held += text
        reasoning, bar, self._held = self._held.rpartition("|")
        before, opening, call = self._held.partition("[")
        if opening and "]" in call:
            name, _, arguments = call.partition("]")[0].partition(":")
            half = len(arguments) // 2
            self.called, self._held = True, ""
            deltas = ToolCallDelta(0, "call_1", name), ToolCallDelta(0, arguments=arguments[:half])
            return Parsed(before, reasoning, (*deltas, ToolCallDelta(0, arguments=arguments[half:])))
        return Parsed(reasoning=reasoning) if bar else Parsed()

    def finish(self) -> Parsed:
        held, self._held = self._held, ""
        return Parsed(held)


def write(tokenizer: Tokenizer, text: str, end: StopReason, stop: tuple[str, ...] = ()) -> Writer:
    writer = Writer(0, Text(tokenizer.detokenizer(), StopStrings(stop), 0, Parser()))
    for token in tokenizer.encode(text):
        writer.push(Output(1, [token]))
    writer.push(Output(1, [EOS] if end is StopReason.STOP else [], end))
    return writer


def test_reasoning_and_calls_are_no_text(tokenizer: Tokenizer) -> None:
    choice = write(tokenizer, 'Let me see.|Looking.[look:{"at": "x"}]', StopReason.STOP).choice(0)
    assert (choice.text, choice.reasoning) == ("Looking.", "Let me see.")
    assert choice.tool_calls == (ToolCall("call_1", "look", '{"at": "x"}'),)
    assert choice.finish_reason == "tool_calls"


def test_only_a_whole_call_at_the_end_of_an_answer_is_its_reason(tokenizer: Tokenizer) -> None:
    assert write(tokenizer, "[look:{}]", StopReason.LENGTH).choice(0).finish_reason == "length"
    half = write(tokenizer, "so [look:{", StopReason.STOP).choice(0)
    assert (half.text, half.finish_reason, half.tool_calls) == ("so [look:{", "stop", ())


def test_a_stop_string_comes_before_the_parser(tokenizer: Tokenizer) -> None:
    choice = write(tokenizer, "Well, [look:{}] END more", StopReason.LENGTH, stop=(" END",)).choice(0)
    assert (choice.text, choice.finish_reason) == ("Well, ", "tool_calls")
    assert choice.tool_calls == (ToolCall("call_1", "look", "{}"),)


def test_pieces_are_shown_once_there_is_something_to_see(tokenizer: Tokenizer) -> None:
    writer = Writer(3, Text(tokenizer.detokenizer(), StopStrings(), 0, Parser()))
    ids = tokenizer.encode("Hm.|Yes")
    pieces = [writer.push(Output(1, [token])) for token in ids]
    pieces.append(writer.push(Output(1, [EOS], StopReason.STOP)))
    shown = [piece for piece in pieces if piece is not None]
    assert [(piece.reasoning, piece.text, piece.finish_reason) for piece in shown] == [
        ("Hm.", "", None), ("", "Yes", "stop")
    ]  # fmt: skip
    whole = joined(shown)
    assert (whole.reasoning, whole.text, whole.token_ids, whole.index) == ("Hm.", "Yes", (*ids, EOS), 3)


@pytest.mark.parametrize("end", [StopReason.CANCELED, StopReason.LENGTH])
def test_what_was_held_back_comes_at_the_end(tokenizer: Tokenizer, end: StopReason) -> None:
    assert write(tokenizer, "a [b", end, stop=("bc",)).choice(0).text == "a [b"

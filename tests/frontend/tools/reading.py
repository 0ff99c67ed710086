"""Answers read by a parser, in pieces, and put together again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ringlm.frontend.tools.formats import Reasoning, ToolFormat
from ringlm.frontend.tools.parser import AnswerParser

TOOLS = {
    "weather": {},
    "weather_in": {"properties": "none"},
    "now": {},
    "write": {
        "properties": {
            "text": {"type": "string"},
            "count": {"type": "integer"},
            "any": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "either": {"type": ["integer", "string"]},
            "wrong": 7,
        }
    },
}


@dataclass(frozen=True)
class Told:
    """What a parser has told of an answer; calls are names with arguments."""

    text: str = ""
    calls: tuple[tuple[str, str], ...] = ()
    called: bool = False
    reasoning: str = ""


def read(pieces: Iterable[str], calling: ToolFormat | None, reasoning: Reasoning | None, opened: bool = False) -> Told:
    parser = AnswerParser(calling, TOOLS, reasoning, opened)
    told = [*(parser.push(piece) for piece in pieces), parser.finish()]
    calls: list[list[str]] = []
    for delta in (delta for news in told for delta in news.tool_calls):
        if delta.index == len(calls):
            assert delta.id
            calls.append([str(delta.name), ""])
        else:
            assert delta.index == len(calls) - 1
            assert delta.id is delta.name is None
        calls[delta.index][1] += delta.arguments
    return Told(
        "".join(news.text for news in told),
        tuple((name, arguments) for name, arguments in calls),
        parser.called,
        "".join(news.reasoning for news in told),
    )

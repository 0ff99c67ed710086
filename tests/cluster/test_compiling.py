"""Grammars that are compiled beside the steps: told when they are done, with what they cannot be, or not awaited."""

from __future__ import annotations

import queue

import pytest

from ringlm.cluster.compiling import Compiled, Compiler
from ringlm.cluster.messages import Submit, Vocabulary
from ringlm.engine.engine import MAX_WAITING
from ringlm.engine.grammar import Grammar
from ringlm.engine.request import SamplingParams, StructuredOutputsParams
from ringlm.errors import QueueFullError, RequestError

VOCABULARY = Vocabulary([b"a", b"b", b"<end>"], [2], [2])


def asking(id: int, lark: str = 'start: "ab"') -> Submit:
    return Submit(id, [0], SamplingParams(structured_outputs=StructuredOutputsParams(grammar=lark)))


def test_each_is_told_when_it_is_done() -> None:
    told: queue.SimpleQueue[Compiled] = queue.SimpleQueue()
    compiler = Compiler(told.put)
    with pytest.raises(RequestError, match="was not told"):
        compiler.compile(asking(0))
    compiler.learn(VOCABULARY, [])
    for id in range(3):
        compiler.compile(asking(id, "start: nobody" if id == 1 else 'start: "ab"'))
    first, second, third = (told.get(timeout=90) for _ in range(3))
    assert [each.request.id for each in (first, second, third)] == [0, 1, 2]
    assert isinstance(first.grammar, Grammar)
    assert isinstance(third.grammar, Grammar)
    assert first.grammar is not third.grammar
    assert isinstance(second.grammar, RequestError)
    assert [compiler.forget(id) for id in (0, 0, 1, 7)] == [True, False, True, False]


def test_a_mistake_is_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ringlm.engine.grammar.Grammars.compile", lambda self, text: 1 / 0)
    told: queue.SimpleQueue[Compiled] = queue.SimpleQueue()
    compiler = Compiler(told.put)
    compiler.learn(VOCABULARY, [])
    compiler.compile(asking(0))
    assert "ZeroDivisionError" in str(told.get(timeout=90).grammar)


def test_no_more_wait_than_may() -> None:
    compiler = Compiler(lambda compiled: None)
    compiler.learn(VOCABULARY, [])
    for id in range(MAX_WAITING):
        compiler.compile(asking(id))
    with pytest.raises(QueueFullError, match="try again later"):
        compiler.compile(asking(999))
    compiler.forget(0)
    compiler.compile(asking(999))

"""Answers that follow a grammar, token by token. Tokens are letters from a on, but for c, which ends an answer."""

from __future__ import annotations

from typing import Any

import llguidance
import numpy as np
import pytest

from ringlm.engine.grammar import Grammars, Masks
from ringlm.engine.request import SamplingParams, StopReason, StructuredOutputsParams
from ringlm.errors import RequestError
from tests.engine.fake import EOS, VOCABULARY, World, alone, grammar_of, tokens_of

PROMPT = [3, 1, 4]


def shaped(lark: str, **params: object) -> SamplingParams:
    shape = StructuredOutputsParams(grammar=lark)
    return SamplingParams(**{"temperature": 1.0, "seed": 1, "max_tokens": 12, "structured_outputs": shape, **params})


def written(params: SamplingParams) -> tuple[str, StopReason | None]:
    """What a request writes, without what ends it."""
    tokens, reason = alone(PROMPT, params)
    ended = reason is StopReason.STOP
    assert not ended or tokens[-1] == EOS
    return "".join(chr(ord("a") + token) for token in tokens[: len(tokens) - ended]), reason


def test_an_answer_is_what_the_grammar_says() -> None:
    seen = {written(shaped('start: "ab" | "ba" | /d[e-g]{2}/', seed=seed, temperature=9.0)) for seed in range(30)}
    assert {reason for _, reason in seen} == {StopReason.STOP}
    texts = {text for text, _ in seen}
    assert texts > {"ab", "ba"}
    assert all(text in ("ab", "ba") or (text[0] == "d" and set(text[1:]) <= set("efg")) for text in texts)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_it_ends_where_nothing_can_follow_whatever_else_is_asked(temperature: float) -> None:
    for asked in ({"min_tokens": 9}, {"ignore_eos": True}, {"logit_bias": {EOS: -100.0}}, {"bad_token_ids": [[EOS]]}):
        assert written(shaped('start: "abd"', temperature=temperature, **asked)) == ("abd", StopReason.STOP)


def test_min_tokens_holds_where_more_can_follow() -> None:
    for seed in range(10):
        text, _ = written(shaped("start: /[a-b]*/", seed=seed, min_tokens=5))
        assert len(text) >= 5


def test_length_cuts() -> None:
    assert written(shaped('start: "abdeabde"', max_tokens=5)) == ("abdea", StopReason.LENGTH)


def test_told_probabilities_are_the_models_own() -> None:
    with World(1) as world:
        for id, params in enumerate(
            (shaped('start: "ab"', logprobs=3), shaped('start: "a"', logprobs=3, max_tokens=1))
        ):
            world.engine.submit(id, PROMPT, params, grammar_of(params))
        world.engine.submit(2, PROMPT, SamplingParams(temperature=0.0, max_tokens=1, logprobs=3))
        news = world.run()
    first, free = news[0][0].logprobs[0], news[2][0].logprobs[0]
    assert first.token == 0
    assert first.top == free.top
    assert news[1][0].logprobs[0] == first


def test_what_leaves_nothing_to_write_is_an_error_of_that_request_alone() -> None:
    forbidden = shaped('start: "a"', bad_token_ids=[[0]])
    with World(1) as world:
        world.engine.submit(0, PROMPT, forbidden, grammar_of(forbidden))
        world.engine.submit(1, PROMPT, SamplingParams(temperature=0.0, max_tokens=2))
        news = world.run()
    assert "excluded by bad_token_ids and structured_outputs" in str(news[0][-1].error)
    assert len(tokens_of(news[1])) == 2


def test_a_grammar_that_runs_out_of_bounds_is_an_error() -> None:
    deep = shaped('start: a\na: "b" | a a a | "b" a "b" a', max_tokens=20)
    grammar = grammar_of(deep)
    assert grammar is not None
    grammar.error = "it is too complex"
    with World(1) as world:
        world.engine.submit(0, PROMPT, deep, grammar)
        assert "cannot be followed further: it is too complex" in str(world.run()[0][-1].error)


@pytest.mark.parametrize(
    ("lark", "why"),
    [
        ("start: nobody", 'unknown name: "nobody"'),
        ("start: /a(/", "unclosed group"),
        ("start: " + "(" * 300 + '"a"' + ")" * 300, "nested"),
        ('start: %json {"oneOf": [{"type": "string"}, {"maxLength": 3}]}', "oneOf"),
    ],
)
def test_a_grammar_that_cannot_be_used_says_why_in_one_line(lark: str, why: str) -> None:
    with pytest.raises(RequestError, match="cannot be enforced") as refused:
        grammar_of(shaped(lark))
    assert why in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500


def test_special_tokens_are_no_text() -> None:
    grammars = Grammars([b"a", b"b", b"<end>", b"<call>", b"<call>"], [2, 3], [2])
    grammar = grammars.compile('%llguidance {"no_forcing": true}\nstart: <[3]> /(.|\\n)*/')
    masks = Masks()
    allowed = []
    for token in (3, 4, 2):
        with masks.made([grammar]):
            pass
        allowed.append(np.flatnonzero(np.isfinite(grammar.masked(np.zeros(5, np.float32)))).tolist())
        grammar.add(token)
    masks.close()
    assert allowed == [[3], [0, 1, 2, 4], [0, 1, 2, 4]]
    assert grammar.ended


def test_a_model_without_an_end_follows_no_grammar() -> None:
    with pytest.raises(RequestError, match="no end-of-sequence token"):
        Grammars([b"a"] * VOCABULARY, [], [])


def test_a_grammar_that_is_asked_for_again_is_kept_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    compile = llguidance.LLMatcher

    def counted(tokenizer: llguidance.LLTokenizer, text: str, **options: Any) -> llguidance.LLMatcher:
        compiled.append(text)
        return compile(tokenizer, text, **options)

    monkeypatch.setattr("llguidance.LLMatcher", counted)
    grammars = Grammars([b"a", b"b", b"<end>"], [2], [2])
    texts = [f'start: "a" /b{{{count}}}/' for count in range(1, 40)]
    for _ in range(64):
        grammars.compile(texts[0])
    assert compiled == texts[:1]
    for text in [*texts, texts[0]]:
        grammars.compile(text)
    assert compiled == [texts[0], *texts, texts[0]]

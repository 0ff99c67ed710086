"""Recorded answers in every format: whole, cut anywhere, and token by token they are told as the same."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringlm.frontend.tokenizer import Tokenizer
from ringlm.frontend.tools.formats import chosen_format
from tests.frontend.tools.reading import Told, read


class Answer(msgspec.Struct, forbid_unknown_fields=True):
    """What was written, and what is to be told of it."""

    format: str
    output: str
    what: str = "a call"
    text: str = ""
    reasoning: str = ""
    calls: tuple[tuple[str, str], ...] = ()
    whole: bool = True

    def told(self) -> Told:
        return Told(self.text, self.calls, self.whole and bool(self.calls), self.reasoning)


class Answers(msgspec.Struct, forbid_unknown_fields=True):
    answer: list[Answer]


ANSWERS = msgspec.toml.decode(Path(__file__).with_name("answers.toml").read_bytes(), type=Answers).answer


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: f"{answer.format}: {answer.what}")
def test_an_answer(answer: Answer, tokenizer: Tokenizer) -> None:
    calling, output = chosen_format(answer.format), answer.output
    assert read([output], calling, None) == answer.told()
    assert read(output, calling, None) == answer.told()
    for at in range(len(output)):
        assert read((output[:at], output[at:]), calling, None) == answer.told(), f"cut before {output[at:]!r}"
    detokenizer = tokenizer.detokenizer(keep=frozenset(calling.openings + calling.inner))
    streamed = [detokenizer.push([token]) for token in tokenizer.encode(output)]
    assert read([*streamed, detokenizer.finish()], calling, None) == answer.told()


@given(data=st.data(), answer=st.sampled_from(ANSWERS))
def test_any_cuts(data: st.DataObject, answer: Answer) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(answer.output)))))
    pieces = [answer.output[start:end] for start, end in zip([0, *cuts], [*cuts, len(answer.output)], strict=True)]
    assert read(pieces, chosen_format(answer.format), None) == answer.told()


@given(data=st.data(), answer=st.sampled_from(ANSWERS))
def test_an_answer_that_ends_anywhere(data: st.DataObject, answer: Answer) -> None:
    """No call that lacks a part is whole, and what is no call is text."""
    cut = answer.output[: data.draw(st.integers(0, len(answer.output)))]
    told = read([cut], chosen_format(answer.format), None)
    assert read(cut, chosen_format(answer.format), None) == told
    sure = len(told.calls) if told.called else max(0, len(told.calls) - 1)
    assert told.calls[:sure] == answer.calls[:sure]
    if not told.calls and answer.format != "harmony":
        assert told.text == cut

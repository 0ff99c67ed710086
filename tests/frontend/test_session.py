"""Requests through a session: pieces, stop strings, cancellation, figures. With an engine that is told what to say."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringlm.engine.request import SamplingParams
from ringlm.errors import ModelError, PeerLostError, RequestError
from ringlm.frontend.answer import Completion, Piece
from ringlm.frontend.session import Generation, Session
from ringlm.frontend.tokenizer import Tokenizer
from tests.frontend.fake import EOS, FakeEngine, until

GREEDY = SamplingParams(temperature=0)
USER = [{"role": "user", "content": "Hi"}]


def saying(tokenizer: Tokenizer | None, text: str, **changes: object) -> tuple[FakeEngine, Session]:
    ids = tokenizer.encode(text) if tokenizer else [5, 6, 7]
    engine = FakeEngine(lambda _: [*ids, EOS], **changes)  # type: ignore[arg-type]
    return engine, Session(engine, tokenizer)


def drained(generation: Generation) -> tuple[list[Piece], Completion]:
    pieces = list(generation.pieces())
    return pieces, generation.result()


def test_a_whole_answer(tokenizer: Tokenizer) -> None:
    engine, session = saying(tokenizer, "Paris, of course 😀.")
    pieces, completion = drained(session.chat(USER, GREEDY))
    ids = tokenizer.encode("Paris, of course 😀.")
    assert engine.submitted[1][0] == tokenizer.chat(USER)
    assert completion.text == "".join(piece.text for piece in pieces) == "Paris, of course 😀."
    assert completion.token_ids == tuple(t for piece in pieces for t in piece.token_ids) == (*ids, EOS)
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["stop"]
    assert completion.finish_reason == "stop"
    assert completion.prompt_tokens == len(tokenizer.chat(USER))
    assert completion.completion_tokens == len(ids) + 1
    # The fake's times: 0.5 s for the prompt, 2 s from the first token to the last, 0.25 s in the ring.
    assert completion.prompt_tokens_per_s == completion.prompt_tokens / 0.5
    assert completion.tokens_per_s == len(ids) / 2
    assert completion.ring_share == 0.1
    assert not engine.canceled


@given(chunk=st.integers(1, 9), stops=st.lists(st.sampled_from(["ten", "n", " five", "x", "6"]), max_size=2))
def test_stop_strings_end_the_request(tokenizer: Tokenizer, chunk: int, stops: list[str]) -> None:
    text = "one two three four five six seven eight nine ten"
    engine, session = saying(tokenizer, text, chunk=chunk)
    pieces, completion = drained(session.complete("Count", GREEDY.replace(stop=tuple(stops))))
    ends = [text.find(stop) for stop in stops if stop in text]
    assert completion.text == "".join(piece.text for piece in pieces) == text[: min(ends, default=len(text))]
    assert completion.finish_reason == "stop"
    until(lambda: not engine.running)
    assert engine.submitted[1][1].stop == ()
    # The tokens are those up to the end of the stop string, however many came at once.
    heard = tokenizer.decode(completion.token_ids)
    assert heard.startswith(completion.text)
    assert completion.completion_tokens == len(completion.token_ids)


def test_a_stop_string_may_be_given_alone_or_in_a_list(tokenizer: Tokenizer) -> None:
    for stop in ("two", ["two"]):
        _, session = saying(tokenizer, "one two three")
        assert session.complete("Go", GREEDY.replace(stop=stop)).result().text == "one "


def test_the_token_that_stops_is_not_in_the_text(tokenizer: Tokenizer) -> None:
    (word,) = tokenizer.encode(" two")
    _, session = saying(tokenizer, "one two three")
    completion = session.complete("Go", GREEDY.replace(stop_token_ids=(word,))).result()
    assert (completion.text, completion.token_ids[-1]) == ("one", word)


def test_max_tokens_in_the_middle_of_a_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("é漢😀")
    _, session = saying(tokenizer, "é漢😀")
    for count in range(1, len(ids) + 1):
        pieces, completion = drained(session.complete("Go", GREEDY.replace(max_tokens=count)))
        assert completion.finish_reason == "length"
        assert completion.text == tokenizer.decode(ids[:count]) == "".join(piece.text for piece in pieces)


def endless(tokenizer: Tokenizer, word: str = " word") -> tuple[FakeEngine, Session]:
    """Says one word again and again, one every few milliseconds."""
    (token,) = tokenizer.encode(word)
    engine = FakeEngine(lambda _: itertools.repeat(token), delay_s=0.003)
    return engine, Session(engine, tokenizer)


def test_ending_a_stream_early_ends_the_request(tokenizer: Tokenizer) -> None:
    engine, session = endless(tokenizer)
    for piece in session.chat(USER, GREEDY).pieces():
        assert piece.text
        break
    until(lambda: not engine.running)
    assert engine.canceled == [1]


def test_ctrl_c_ends_the_request_and_keeps_what_was_said(tokenizer: Tokenizer) -> None:
    engine, session = endless(tokenizer)
    generation = session.chat(USER, GREEDY)
    heard = []

    def listen() -> None:
        with generation:
            for count, piece in enumerate(generation.pieces()):
                heard.append(piece)
                if count == 1:
                    raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        listen()
    completion = generation.result()
    heard += generation.pieces()  # what came until the engine knew
    assert (completion.text, completion.finish_reason) == ("".join(piece.text for piece in heard), "canceled")
    assert completion.token_ids == tuple(token for piece in heard for token in piece.token_ids)
    assert (set(engine.canceled), engine.running) == ({1}, [])
    assert session.chat(USER, GREEDY.replace(max_tokens=3)).result().text == " word word word"


def test_requests_run_at_the_same_time(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(lambda prompt: [*prompt, EOS], delay_s=0.001)
    session = Session(engine, tokenizer)
    texts = ["one", "two words", "and three words"]
    running = [session.complete(text, GREEDY) for text in texts]
    first = running[2].result()  # in any order
    assert [first.text, running[0].result().text, running[1].result().text] == [texts[2], texts[0], texts[1]]


def test_a_model_without_tokenizer_takes_ids() -> None:
    engine, session = saying(None, "")
    pieces, completion = drained(session.complete([1, 2, 3], GREEDY))
    assert (completion.text, completion.token_ids) == ("", (5, 6, 7, EOS))
    assert [piece.token_ids for piece in pieces] == [(5,), (6,), (7,), (EOS,)]
    for call in (lambda: session.complete("text", GREEDY), lambda: session.chat(USER, GREEDY)):
        with pytest.raises(ModelError, match="token ids only"):
            call()
    with pytest.raises(RequestError, match="need a tokenizer"):
        session.complete([1], GREEDY.replace(stop=("x",)))
    assert len(engine.submitted) == 1


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([], "empty"),
        ([1] * 16, "16 tokens and the context holds 16"),
        ([1, 99], "99 is no token id"),
        ([-1], "-1 is no token id"),
        ([1.5], "whole numbers"),
        (["a"], "whole numbers"),
    ],
)
def test_prompts_that_cannot_be_used(prompt: list[int], words: str) -> None:
    session = Session(FakeEngine(lambda _: [], context=16, vocabulary=99), None)
    with pytest.raises(RequestError, match=words):
        session.complete(prompt, GREEDY)


def test_an_engine_that_refuses_or_fails(tokenizer: Tokenizer) -> None:
    lost = PeerLostError("rank 1 closed its link.", 1)
    engine, session = saying(tokenizer, "one two three", fail_after=1, failure=lost)
    with pytest.raises(PeerLostError, match="rank 1"):
        list(session.chat(USER, GREEDY).pieces())
    with session:
        pass
    assert engine.closed


def test_tokenizer_eos_stops_too_unless_told_not_to(tokenizer: Tokenizer) -> None:
    engine, session = saying(tokenizer, "one")
    session.complete("a", GREEDY).result()
    session.complete("a", GREEDY.replace(ignore_eos=True)).result()
    assert [params.stop_token_ids for _, params in engine.submitted.values()] == [(2,), ()]

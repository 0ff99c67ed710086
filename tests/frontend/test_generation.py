"""Answers to threads and event loops: many at once, slow and absent readers, several choices, and the engine's end."""

from __future__ import annotations

import asyncio
import gc
import itertools
import threading
import time
import weakref

import pytest

from ringlm.engine.request import SamplingParams
from ringlm.errors import PeerLostError, QueueFullError, RequestError, RingError, RingLMError
from ringlm.frontend.answer import Completion, Piece
from ringlm.frontend.session import Session
from ringlm.frontend.tokenizer import Tokenizer
from tests.frontend.fake import EOS, FakeEngine, until

GREEDY = SamplingParams(temperature=0)


def echo(**changes: object) -> tuple[FakeEngine, Session]:
    """Says the prompt again; without a tokenizer, so every token is a piece."""
    engine = FakeEngine(lambda prompt: [*prompt, EOS], **changes)  # type: ignore[arg-type]
    return engine, Session(engine, None)


def endless(**changes: object) -> tuple[FakeEngine, Session]:
    engine = FakeEngine(lambda _: itertools.count(3), delay_s=0.002, **changes)  # type: ignore[arg-type]
    return engine, Session(engine, None)


def test_threads_share_a_session() -> None:
    _, session = echo()
    heard: dict[int, Completion] = {}

    def ask(number: int) -> None:
        heard[number] = session.complete([10 + number] * (1 + number), GREEDY).result()

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    assert {number: completion.token_ids for number, completion in heard.items()} == {
        number: (*[10 + number] * (1 + number), EOS) for number in range(20)
    }


def test_an_event_loop_hears_the_same_pieces() -> None:
    _, session = echo()

    async def listen(prompt: list[int]) -> tuple[list[Piece], Completion]:
        generation = session.complete(prompt, GREEDY)
        return [piece async for piece in generation], await generation.completion()

    async def together() -> list[tuple[list[Piece], Completion]]:
        return await asyncio.gather(*[listen([5 + number, 9]) for number in range(8)])

    for number, (pieces, completion) in enumerate(asyncio.run(together())):
        assert completion == session.complete([5 + number, 9], GREEDY).result()
        assert tuple(token for piece in pieces for token in piece.token_ids) == completion.token_ids
        assert pieces[-1].finish_reason == completion.finish_reason == "stop"


def test_who_leaves_a_stream_or_is_cancelled_ends_the_request() -> None:
    engine, session = endless()

    async def leave() -> None:
        async with session.complete([1], GREEDY) as generation:
            async for _ in generation:
                break

    async def are_cancelled() -> None:
        async def listen() -> None:
            async for _ in session.complete([1], GREEDY):
                pass

        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(listen(), 0.05)

    async def wait_no_longer() -> None:
        async with session.complete([1], GREEDY) as generation:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(generation.completion(), 0.05)
            generation.cancel()
            assert (await generation.completion()).finish_reason == "canceled"

    for number, way in enumerate((leave, are_cancelled, wait_no_longer), 1):
        asyncio.run(way())
        until(lambda: not engine.running)
        assert set(engine.canceled) == set(range(1, number + 1))


def test_a_late_reader_gets_larger_pieces() -> None:
    _, session = echo()
    generation = session.complete([5] * 300, GREEDY)
    whole = generation.result()
    (piece,) = generation.pieces()
    assert (piece.token_ids, piece.finish_reason) == (whole.token_ids, "stop")


def test_nobody_waits_for_a_reader_that_is_gone() -> None:
    engine, session = endless()
    abandoned = session.complete([1], GREEDY.replace(max_tokens=50))
    assert session.complete([1], GREEDY.replace(max_tokens=10)).result().completion_tokens == 10
    until(lambda: not engine.running)
    assert abandoned.result().completion_tokens == 50


@pytest.mark.parametrize("chunk", [1, 7])
def test_several_choices(tokenizer: Tokenizer, chunk: int) -> None:
    says = itertools.cycle(["one two", "three", "four five six"])
    engine = FakeEngine(lambda _: [*tokenizer.encode(next(says)), EOS], chunk=chunk)
    session = Session(engine, tokenizer)
    completion = session.complete("Go", GREEDY.replace(n=3, seed=7)).result()
    assert [choice.text for choice in completion.choices] == ["one two", "three", "four five six"]
    assert [choice.index for choice in completion.choices] == [0, 1, 2]
    assert completion.text == "one two"
    assert completion.completion_tokens == sum(len(choice.token_ids) for choice in completion.choices)
    # Each is a request of its own with a seed of its own.
    assert [params.seed for _, params in engine.submitted.values()] == [7, 8, 9]
    assert all(params.n == 1 and params.best_of is None for _, params in engine.submitted.values())
    texts, ends = ["", "", ""], []
    for piece in session.complete("Go", GREEDY.replace(n=3)).pieces():
        texts[piece.index] += piece.text
        ends += [piece.index] if piece.finish_reason else []
    assert texts == ["one two", "three", "four five six"]
    assert sorted(ends) == [0, 1, 2]


def test_the_likeliest_of_several_are_chosen() -> None:
    answers = iter([[50, EOS], [7, EOS], [30, EOS], [6, EOS]])  # token t has the logprob -t / 100
    engine = FakeEngine(lambda _: next(answers))
    session = Session(engine, None)
    params = GREEDY.replace(n=2, best_of=4)
    completion = session.complete([1], params).result()
    assert [choice.token_ids for choice in completion.choices] == [(6, EOS), (7, EOS)]
    assert [choice.index for choice in completion.choices] == [0, 1]
    assert completion.choices[0].logprobs == ()  # nobody asked to see them
    assert completion.completion_tokens == 8
    engine._answer = lambda _: [5, EOS]
    with pytest.raises(RequestError, match="cannot be streamed"):
        list(session.complete([1], params).pieces())
    assert session.complete([1], GREEDY.replace(n=2, best_of=2)).result().choices[1].token_ids == (5, EOS)


def test_logprobs_are_put_into_words(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("é!")
    assert len(ids) == 2
    engine = FakeEngine(lambda _: [*ids, EOS])
    session = Session(engine, tokenizer)
    pieces = list(session.complete("Go", GREEDY.replace(logprobs=2)).pieces())
    told = [logprob for piece in pieces for logprob in piece.logprobs]
    assert all(len(piece.logprobs) == len(piece.token_ids) for piece in pieces)
    assert [(one.token, one.text, one.data) for one in told] == [
        (ids[0], "é", "é".encode()), (ids[1], "!", b"!"), (EOS, "<|im_end|>", b"<|im_end|>")
    ]  # fmt: skip
    assert told[0].logprob == -ids[0] / 100
    assert [(one.token, one.text, one.logprob) for one in told[0].top] == [
        (0, "<|endoftext|>", 0.0), (1, "<|im_start|>", -0.01)
    ]  # fmt: skip
    assert session.complete("Go", GREEDY.replace(logprobs=2)).result().choices[0].logprobs == tuple(told)


def test_words_become_tokens_for_the_engine(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(lambda _: [EOS])
    session = Session(engine, tokenizer)
    session.complete("Go", GREEDY.replace(bad_words=("two",), bad_token_ids=((5, 6),))).result()
    sent = engine.submitted[1][1]
    bare, spaced = tokenizer.encode("two"), tokenizer.encode(" two")
    assert [list(ids) for ids in sent.bad_token_ids] == [[5, 6], bare, spaced]
    assert sent.bad_words == ()
    for wrong in ({"logit_bias": {10**6: 1.0}}, {"bad_token_ids": ((-1,),)}):
        with pytest.raises(RequestError, match="is no token id for"):
            session.complete("Go", GREEDY.replace(**wrong))
    assert len(engine.submitted) == 1


def test_stop_strings_wait_for_min_tokens(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(lambda _: [*tokenizer.encode("one two one two one two"), EOS])
    session = Session(engine, tokenizer)
    for least, text in ((0, "one"), (1, "one"), (2, "one two one"), (3, "one two one"), (4, "one two one two one")):
        params = GREEDY.replace(stop=(" two",), min_tokens=least)
        assert session.complete("Go", params).result().text == text


def test_vectors_come_to_threads_and_loops() -> None:
    _, session = echo()
    vector = memoryview(session.embed([3, 4]).result(10).vector).cast("f").tolist()

    async def wait() -> list[float]:
        return memoryview((await session.embed([3, 4])).vector).cast("f").tolist()

    assert vector == asyncio.run(wait()) == [3.0, 4.0]
    with pytest.raises(RequestError, match="empty"):
        session.embed([])


def test_the_end_of_an_engine_reaches_all_who_wait() -> None:
    lost = PeerLostError("rank 1 closed its link.", 1)
    _, session = endless(fail_after=20, failure=lost)
    streamed, whole, awaited = (session.complete([1], GREEDY) for _ in range(3))
    errors: list[BaseException] = []

    def listen() -> None:
        with pytest.raises(PeerLostError) as caught:
            list(streamed.pieces())
        errors.append(caught.value)

    thread = threading.Thread(target=listen)
    thread.start()
    with pytest.raises(PeerLostError, match="rank 1"):
        whole.result()
    with pytest.raises(PeerLostError, match="rank 1"):
        asyncio.run(awaited.completion())
    thread.join(90)
    assert errors == [lost]
    assert session.failure is lost
    for ask in (lambda: session.complete([1], GREEDY), lambda: session.embed([1])):
        with pytest.raises(PeerLostError, match="rank 1"):
            ask()


def test_closing_ends_what_runs() -> None:
    engine, session = endless()
    generation = session.complete([1], GREEDY)
    session.close()
    session.close()
    with pytest.raises(RingError, match="closed"):
        list(generation.pieces())
    assert engine.closed


def test_refusals() -> None:
    engine, session = echo()
    engine._refusal = "too long", False
    with pytest.raises(RequestError, match="too long") as caught:
        session.complete([1], GREEDY.replace(n=3)).result()
    assert not isinstance(caught.value, QueueFullError)
    engine._refusal = "too many wait", True
    with pytest.raises(QueueFullError, match="too many wait"):
        list(session.complete([1], GREEDY).pieces())


def test_a_mistake_in_one_answer_ends_that_one(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine(lambda _: [*tokenizer.encode("one"), EOS])
    session = Session(engine, tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr("ringlm.frontend.stops.StopStrings.push", lambda *_: 1 // 0)
        with pytest.raises(RingLMError, match="mistake") as caught:
            session.complete("Go", GREEDY).result()
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert session.complete("Go", GREEDY).result().text == "one"


def test_a_session_that_nobody_holds_is_closed() -> None:
    engine, session = endless()
    stream = session.complete([1], GREEDY.replace(max_tokens=20)).pieces()
    gone = weakref.ref(session)
    del session
    time.sleep(0.01)
    gc.collect()
    assert len([token for piece in stream for token in piece.token_ids]) == 20  # a stream holds it
    del stream
    until(lambda: gc.collect() is not None and gone() is None)
    until(lambda: engine.closed)

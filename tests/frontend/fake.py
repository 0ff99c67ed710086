"""An engine that says what a test tells it to: the same interface as EngineClient, no process, no model."""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable, Iterable
from itertools import islice

from ringlm.cluster.messages import Embedding, Output, Progress, RankReport, Ready, Recovering, Stats, Vocabulary
from ringlm.cluster.spec import EngineSpec
from ringlm.engine.request import SamplingParams, StopReason, TokenLogprob
from ringlm.errors import RingError

EOS = 2
EMBED = 10**9  # max_tokens of what is to be embedded


class FakeEngine:
    """Answers every prompt with `answer(prompt)`, `chunk` tokens an event, requests in turn; waits while none runs.

    `delay_s` passes before each event; `fail_after` events the engine is lost with `failure`. Token t has the logprob
    -t / 100, and the likeliest in its place are 0, 1, …; the vector of a prompt is its tokens.
    """

    def __init__(
        self,
        answer: Callable[[list[int]], Iterable[int]],
        *,
        context: int = 2048,
        vocabulary: int = 49152,
        chunk: int = 1,
        delay_s: float = 0.0,
        fail_after: int | None = None,
        failure: Exception | None = None,
    ) -> None:
        self.ready = Ready(
            "fake", 2, context, vocabulary, [EOS], "float32", "none", [RankReport("cpu", 1, 100, 200)] * 2
        )
        self.stats: Stats | None = None
        self.recovering: Recovering | None = None
        self.submitted: dict[int, tuple[list[int], SamplingParams]] = {}
        self.canceled: list[int] = []
        self.closed = False
        self._answer = answer
        self._left: dict[int, Iterable[int]] = {}
        self._sent: dict[int, int] = {}
        self._chunk, self._delay_s = chunk, delay_s
        self._fail_after, self._failure = fail_after, failure
        self._refusal: tuple[str, bool] | None = None  # why nothing is answered, and whether the queue is full
        self._changed = threading.Condition()

    @property
    def running(self) -> list[int]:
        with self._changed:
            return list(self._left)

    def teach(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary

    def submit(self, prompt_tokens: list[int], params: SamplingParams) -> int:
        with self._changed:
            request = len(self.submitted) + 1
            self.submitted[request] = (prompt_tokens, params)
            self._left[request] = iter(self._answer(prompt_tokens))
            self._sent[request] = 0
            self._changed.notify()
        return request

    def embed(self, prompt_tokens: list[int]) -> int:
        return self.submit(prompt_tokens, SamplingParams(max_tokens=EMBED))

    def cancel(self, request: int) -> None:
        with self._changed:
            self.canceled.append(request)

    def next_event(self, timeout_s: float | None = None) -> Output | Embedding | None:
        if self._fail_after is not None:
            self._fail_after -= 1
            if self._fail_after < 0 and self._failure is not None:
                raise self._failure
        time.sleep(self._delay_s)
        with self._changed:
            if not self._changed.wait_for(lambda: self._left or self.closed, timeout_s):
                return None
            if self.closed:
                raise RingError("the engine is closed.")
            return self._advance(*next(iter(self._left.items())))

    def close(self) -> None:
        with self._changed:
            self.closed = True
            self._changed.notify()

    def _advance(self, request: int, left: Iterable[int]) -> Output | Embedding:
        del self._left[request]
        prompt, params = self.submitted[request]
        if self._refusal is not None:
            return Output(request, [], error=self._refusal[0], busy=self._refusal[1])
        if request in self.canceled:
            return self._last(request, [], StopReason.CANCELED)
        if params.max_tokens == EMBED:
            return Embedding(request, struct.pack(f"{len(prompt)}f", *prompt))
        room = params.max_tokens - self._sent[request]
        now = list(islice(left, min(self._chunk, room)))
        self._sent[request] += len(now)
        ends = {*params.stop_token_ids, *(() if params.ignore_eos else (EOS,))}
        for index, token in enumerate(now):
            if token in ends:
                return self._last(request, now[: index + 1], StopReason.STOP)
        if len(now) < self._chunk or self._sent[request] == params.max_tokens:
            return self._last(request, now, StopReason.LENGTH)
        self._left[request] = left
        return Output(request, now, logprobs=self._logprobs(request, now))

    def _last(self, request: int, tokens: list[int], reason: StopReason) -> Output:
        logprobs = self._logprobs(request, tokens)
        return Output(request, tokens, reason, prefill_s=0.5, decode_s=2.0, ring_s=0.25, logprobs=logprobs)

    def _logprobs(self, request: int, tokens: list[int]) -> list[TokenLogprob]:
        count = self.submitted[request][1].logprobs
        if count is None:
            return []
        return [TokenLogprob(token, -token / 100, [(i, -i / 100) for i in range(count)]) for token in tokens]


def until(condition: Callable[[], object]) -> None:
    """Wait for what a thread is about to do."""
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def install(monkeypatch_setattr: Callable[[str, object], None], engine: FakeEngine) -> list[EngineSpec]:
    """Put `engine` in the place of every engine that is started; the specifications asked for."""
    specs: list[EngineSpec] = []

    def start(spec: EngineSpec, on_progress: Callable[[Progress], None] | None = None) -> FakeEngine:
        specs.append(spec)
        engine.closed = False
        if on_progress is not None:
            on_progress(Progress("connect"))
            on_progress(Progress("load", 50, 100))
        return engine

    monkeypatch_setattr("ringlm.cluster.client.EngineClient.start", start)
    return specs

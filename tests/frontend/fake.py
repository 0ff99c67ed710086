"""An engine that says what a test tells it to: the same interface as EngineClient, no process, no model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from ringlm.cluster.messages import Output, Progress, RankReport, Ready
from ringlm.cluster.spec import EngineSpec
from ringlm.engine.request import SamplingParams, StopReason

EOS = 2


class FakeEngine:
    """Answers every prompt with `answer(prompt)`, a token an event, requests in turn.

    `delay_s` passes before each token; `fail_after` events the engine is lost with `failure`.
    """

    def __init__(
        self,
        answer: Callable[[list[int]], Sequence[int]],
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
        self.submitted: dict[int, tuple[list[int], SamplingParams]] = {}
        self.canceled: list[int] = []
        self.closed = False
        self._answer = answer
        self._left: dict[int, list[int]] = {}
        self._sent: dict[int, int] = {}
        self._chunk, self._delay_s = chunk, delay_s
        self._fail_after, self._failure = fail_after, failure

    @property
    def running(self) -> list[int]:
        return list(self._left)

    def submit(self, prompt_tokens: list[int], params: SamplingParams) -> int:
        request = len(self.submitted) + 1
        self.submitted[request] = (prompt_tokens, params)
        self._left[request] = list(self._answer(prompt_tokens))
        self._sent[request] = 0
        return request

    def cancel(self, request: int) -> None:
        self.canceled.append(request)
        if request in self._left:
            self._left[request] = []

    def next_event(self, timeout_s: float | None = None) -> Output | None:
        if self._fail_after is not None:
            self._fail_after -= 1
            if self._fail_after < 0 and self._failure is not None:
                raise self._failure
        assert self._left, "waits for news although nothing runs"
        time.sleep(self._delay_s)
        request, left = next(iter(self._left.items()))
        del self._left[request]
        if request in self.canceled:
            return self._last(request, [], StopReason.CANCELED)
        params = self.submitted[request][1]
        room = params.max_tokens - self._sent[request]
        now, rest = left[: min(self._chunk, room)], left[min(self._chunk, room) :]
        self._sent[request] += len(now)
        ends = {*params.stop_token_ids, *(() if params.ignore_eos else (EOS,))}
        for index, token in enumerate(now):
            if token in ends:
                return self._last(request, now[: index + 1], StopReason.STOP)
        if not rest or self._sent[request] == params.max_tokens:
            return self._last(request, now, StopReason.LENGTH)
        self._left[request] = rest
        return Output(request, now)

    def close(self) -> None:
        self.closed = True

    def _last(self, request: int, tokens: list[int], reason: StopReason) -> Output:
        return Output(request, tokens, reason, prefill_s=0.5, decode_s=2.0, ring_s=0.25)


def install(monkeypatch_setattr: Callable[[str, object], None], engine: FakeEngine) -> list[EngineSpec]:
    """Put `engine` in the place of every engine that is started; the specifications asked for."""
    specs: list[EngineSpec] = []

    def start(spec: EngineSpec, on_progress: Callable[[Progress], None] | None = None) -> FakeEngine:
        specs.append(spec)
        if on_progress is not None:
            on_progress(Progress("connect"))
            on_progress(Progress("load", 50, 100))
        return engine

    monkeypatch_setattr("ringlm.cluster.client.EngineClient.start", start)
    return specs

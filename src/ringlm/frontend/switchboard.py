"""Between an engine and all who ask it: a thread hears its news and passes each to the one it is for.

Knows requests by number, no text. Any thread may call it; nobody waits for a listener that is slow.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Protocol

from ringlm.cluster.messages import Embedding, Output, Ready, Recovering, Stats, Vocabulary
from ringlm.engine.request import SamplingParams
from ringlm.errors import QueueFullError, RequestError, RingLMError, unforeseen

_JOIN_S = 5.0

Listener = Callable[[Output | Embedding | RingLMError], None]  # an error is the last that it hears


class Engine(Protocol):
    """What is needed of `ringlm.cluster.client.EngineClient`."""

    ready: Ready
    stats: Stats | None
    recovering: Recovering | None

    def teach(self, vocabulary: Vocabulary) -> None: ...
    def submit(self, prompt_tokens: list[int], params: SamplingParams) -> int: ...
    def embed(self, prompt_tokens: list[int]) -> int: ...
    def cancel(self, request: int) -> None: ...
    def next_event(self, timeout_s: float | None = None) -> Output | Embedding | None: ...
    def close(self) -> None: ...


class Switchboard:
    """Passes on news of `engine`, which it owns. `failure` is what has ended the engine.

    Listeners are called on its thread, in order, and must not wait.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.failure: RingLMError | None = None
        self._listeners: dict[int, Listener] = {}
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="ringlm-switchboard", daemon=True)
        self._thread.start()

    def ask(self, how: Callable[[], int], listener: Listener) -> int:
        """Hand in a request by a call that returns its number. Raises what has ended the engine."""
        with self._lock:  # news of it must not come before its listener is here
            if self.failure is not None:
                raise self.failure
            request = how()
            self._listeners[request] = listener
        return request

    def cancel(self, request: int) -> None:
        """End a request, if it runs; its listener hears of it."""
        if request in self._listeners:
            with contextlib.suppress(RingLMError):  # of which the listener hears too
                self._engine.cancel(request)

    def close(self) -> None:
        """End the engine, of which every listener hears."""
        self._engine.close()
        if threading.current_thread() is not self._thread:
            self._thread.join(_JOIN_S)

    def _run(self) -> None:
        try:
            while True:
                news = self._engine.next_event()
                if news is not None:
                    self._pass_on(news)
        except RingLMError as error:
            failure = error
        except Exception as error:  # noqa: BLE001 - whoever waits has to know
            failure = unforeseen("the session", error)
        with self._lock:
            self.failure = failure
            left, self._listeners = self._listeners, {}
        for listener in left.values():
            listener(failure)

    def _pass_on(self, news: Output | Embedding) -> None:
        ends = isinstance(news, Embedding) or news.finish_reason is not None or news.error is not None
        with self._lock:
            listener = self._listeners.pop(news.id, None) if ends else self._listeners.get(news.id)
        if listener is None:
            return
        if isinstance(news, Output) and news.error is not None:
            listener(QueueFullError(news.error) if news.busy else RequestError(news.error))
        else:
            listener(news)

"""A prompt's answers on their way: streamed or whole, to a thread or to an event loop. Knows writers, no engine.

The session's thread writes and never waits for a reader: what a slow one has not taken becomes one larger piece.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence

from ringlm.cluster.messages import Embedding, Output
from ringlm.engine.request import SamplingParams
from ringlm.errors import RequestError, RingLMError, unforeseen
from ringlm.frontend.answer import Completion, Piece
from ringlm.frontend.reply import Reply
from ringlm.frontend.writer import Writer, joined


class Generation:
    """One prompt and its answers. `pieces` (or `async for`) streams them, `result` (or `await completion()`) waits for
    their end, `cancel` ends them early, and so does the end of a `with` block, or of an iteration.

    `cached_tokens` of the prompt were found in the prefix cache, which is known from the first token on. What has ended
    the engine, or the RequestError with which it refused the prompt, is raised wherever somebody waits.
    """

    def __init__(
        self,
        prompt_tokens: int,
        params: SamplingParams,
        writers: Sequence[Writer],
        cancel: Callable[[int], None],
    ) -> None:
        self.prompt_tokens = prompt_tokens
        self.cached_tokens = 0
        self.requests: list[int] = []  # the engine's numbers of the answers that were handed in
        self._params = params
        self._writers = writers
        self._cancel = cancel
        self._lock = threading.Lock()  # of the three below, which both sides change
        self._pending: dict[int, list[Piece]] = {}  # what nobody has taken yet, by answer
        self._news: Reply[None] | None = None  # for those who wait for a piece
        self._error: RingLMError | None = None
        self._end: Reply[None] = Reply()

    def pieces(self) -> Iterator[Piece]:
        """The answers as they come, each piece with its answer's `index`. RequestError with best_of above n."""
        try:
            while (news := self._take()) is not None:
                if isinstance(news, Piece):
                    yield news
                else:
                    news.result()
        finally:
            self.cancel()

    async def __aiter__(self) -> AsyncIterator[Piece]:
        try:
            while (news := self._take()) is not None:
                if isinstance(news, Piece):
                    yield news
                else:
                    await news
        finally:
            self.cancel()

    def result(self) -> Completion:
        """Everything, once all answers have ended."""
        self._end.result()
        return self._completion()

    async def completion(self) -> Completion:
        """Everything, once all answers have ended."""
        await self._end
        return self._completion()

    def cancel(self) -> None:
        """End the answers that still go on; what has come of them stays. Idempotent."""
        for request in self.requests:
            self._cancel(request)

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, *error: object) -> None:
        self.cancel()

    async def __aenter__(self) -> Generation:
        return self

    async def __aexit__(self, *error: object) -> None:
        self.cancel()

    def hear(self, writer: Writer, news: Output | Embedding | RingLMError) -> None:
        """The engine's news of one of the answers. Called by one thread; does not raise."""
        try:
            if isinstance(news, RingLMError):
                self._fail(news)
            elif isinstance(news, Output):
                self._write(writer, news)
        except Exception as error:  # noqa: BLE001 - the session and its other requests go on
            self._fail(unforeseen("the answer", error))

    def _write(self, writer: Writer, output: Output) -> None:
        with self._lock:
            piece = writer.push(output)
            if piece is not None:
                self._pending.setdefault(writer.index, []).append(piece)
        self.cached_tokens = self.cached_tokens or output.cached_tokens
        if piece is not None:
            self._tell()
        if writer.reason is not None and output.finish_reason is None:
            self._cancel(output.id)  # a stop string has ended it, which the engine does not know
        if writer.last is not None and all(each.last is not None for each in self._writers):
            self._end.set_result(None)

    def _fail(self, error: RingLMError) -> None:
        """The first error of any answer ends all."""
        if self._error is None and not self._end.done():
            with self._lock:
                self._error = error
            self._tell()
            self._end.set_exception(error)
            self.cancel()

    def _tell(self) -> None:
        """Wake who waits for a piece."""
        with self._lock:
            news, self._news = self._news, None
        if news is not None:
            news.set_result(None)

    def _take(self) -> Piece | Reply[None] | None:
        """The next piece, or what to wait for, or None at the end."""
        if len(self._writers) > self._params.n:
            raise RequestError("best_of above n chooses among whole answers, which cannot be streamed.")
        with self._lock:
            for index in self._pending:
                return joined(self._pending.pop(index))
            if self._error is not None:
                raise self._error
            if all(writer.reason is not None for writer in self._writers):
                return None
            self._news = self._news or Reply()
            return self._news

    def _completion(self) -> Completion:
        best = list(self._writers)
        if len(best) > self._params.n:
            best = sorted(best, key=lambda writer: writer.likelihood, reverse=True)[: self._params.n]
        choices = tuple(writer.choice(index) for index, writer in enumerate(best))
        ends = [writer.last for writer in self._writers if writer.last is not None]
        decode_s = max(end.decode_s for end in ends)
        busy_s = sum(end.prefill_s + end.decode_s for end in ends)
        count = sum(writer.count for writer in self._writers)
        later = count - len(ends)  # tokens after the first ones, which the prompt gives
        return Completion(
            choices=choices,
            text=choices[0].text,
            token_ids=choices[0].token_ids,
            finish_reason=choices[0].finish_reason,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=count,
            prompt_tokens_per_s=self.prompt_tokens / ends[0].prefill_s if ends[0].prefill_s > 0 else 0.0,
            tokens_per_s=later / decode_s if decode_s > 0 and later > 0 else 0.0,
            ring_share=sum(end.ring_s for end in ends) / busy_s if busy_s > 0 else 0.0,
            cached_tokens=self.cached_tokens,
            queue_s=ends[0].queue_s,
        )

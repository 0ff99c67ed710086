"""From text to an engine and back: a request's way, and what became of it. Knows one engine, no terminal.

    text or messages -> token ids -> engine -> tokens -> text, piece by piece

One thread uses a session. Any number of its requests may run at once.
"""

from __future__ import annotations

import collections
import operator
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from ringlm.cluster.messages import Output, Progress, Ready
from ringlm.engine.request import SamplingParams, StopReason
from ringlm.errors import ModelError, RequestError
from ringlm.frontend.answer import Choice, Completion, Piece
from ringlm.frontend.stops import StopStrings

if TYPE_CHECKING:
    from ringlm.cluster.spec import EngineSpec
    from ringlm.frontend.conversation import Message
    from ringlm.frontend.detokenizer import Detokenizer
    from ringlm.frontend.model import Model
    from ringlm.frontend.tokenizer import Tokenizer

_POLL_S = 1.0  # how often a wait looks up, so that Ctrl-C is noticed on every platform


class Engine(Protocol):
    """What a session needs of `ringlm.cluster.client.EngineClient`."""

    ready: Ready

    def submit(self, prompt_tokens: list[int], params: SamplingParams) -> int: ...
    def cancel(self, request: int) -> None: ...
    def next_event(self, timeout_s: float | None = None) -> Output | None: ...
    def close(self) -> None: ...


class Session:
    """A tokenizer and an engine, ready for requests. Ends every rank when it is closed."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer | None) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._live: dict[int, Generation] = {}

    @classmethod
    def start(
        cls,
        spec: EngineSpec,
        model: Model,
        on_progress: Callable[[Progress], None] | None = None,
        chat_template: Path | None = None,
    ) -> Session:
        """Start an engine and read the tokenizer meanwhile, with another template than its own where one is given.
        Raises the RingLMError that ended either."""
        from ringlm.cluster.client import EngineClient
        from ringlm.frontend.tokenizer import Tokenizer

        with ThreadPoolExecutor(1, thread_name_prefix="ringlm-tokenizer") as pool:
            tokenizer = pool.submit(Tokenizer.open, model, chat_template)
            engine = EngineClient.start(spec, on_progress)
            try:
                return cls(engine, tokenizer.result())
            except BaseException:
                engine.close()
                raise

    @property
    def ready(self) -> Ready:
        """What the engine said when it was ready: world size, context, devices."""
        return self._engine.ready

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises ModelError for a model that has none."""
        if self._tokenizer is None:
            raise ModelError(
                f"{self.ready.model} has no tokenizer (tokenizer.json), so it takes token ids only; "
                "copy the tokenizer's files into the model's folder."
            )
        return self._tokenizer

    def complete(self, prompt: str | Sequence[int], params: SamplingParams) -> Generation:
        """Go on from a text or from token ids. Raises RequestError for a prompt that cannot be used."""
        tokens = self.tokenizer.encode(prompt) if isinstance(prompt, str) else _ids(prompt)
        return self._submit(tokens, params, continues=True)

    def chat(self, messages: Sequence[Message], params: SamplingParams) -> Generation:
        """Answer a conversation in the model's chat template. Raises RequestError, ModelError."""
        return self._submit(self.tokenizer.chat(messages), params, continues=False)

    def close(self) -> None:
        """End every rank. Idempotent."""
        self._live.clear()
        self._engine.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _submit(self, tokens: list[int], params: SamplingParams, continues: bool) -> Generation:
        _check(tokens, self.ready)
        stops = (params.stop,) if isinstance(params.stop, str) else tuple(params.stop)
        if stops and self._tokenizer is None:
            raise RequestError("stop strings need a tokenizer, and this model has none; use stop_token_ids.")
        ends = () if params.ignore_eos or self._tokenizer is None else self._tokenizer.eos_token_ids
        # Stop strings are searched for here; the engine knows token ids only.
        sent = params.replace(stop=(), stop_token_ids=(*params.stop_token_ids, *ends))
        request = self._engine.submit(tokens, sent)
        detokenizer = self._tokenizer.detokenizer(continues) if self._tokenizer else None
        generation = Generation(self, request, len(tokens), detokenizer, StopStrings(stops))
        self._live[request] = generation
        return generation

    def _cancel(self, request: int) -> None:
        self._engine.cancel(request)

    def _pump(self) -> None:
        """Wait a moment for news and hand it to the request that it is for."""
        output = self._engine.next_event(_POLL_S)
        generation = self._live.get(output.id) if output is not None else None
        if output is None or generation is None:
            return
        generation._feed(output)
        if output.finish_reason is not None or output.error is not None:
            del self._live[output.id]


class Generation:
    """One request on its way. `pieces` streams it, `result` waits for its end, `close` ends it early.

    As a context manager it is closed at the end of the block, whatever happens in it.
    """

    def __init__(
        self,
        session: Session,
        request: int,
        prompt_tokens: int,
        detokenizer: Detokenizer | None,
        stops: StopStrings,
    ) -> None:
        self.prompt_tokens = prompt_tokens
        self._session = session
        self._request = request
        self._detokenizer = detokenizer
        self._stops = stops
        self._pieces: collections.deque[Piece] = collections.deque()
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._told = 0  # how many of them are in pieces
        self._reason: StopReason | None = None
        self._last: Output | None = None  # the engine's last word

    def pieces(self) -> Iterator[Piece]:
        """The answer as it comes. Ending the iteration early ends the request.

        Raises RequestError when the engine refuses it, or the error that ended the engine.
        """
        try:
            while True:
                while self._pieces:
                    yield self._pieces.popleft()
                if self._reason is not None:
                    return
                self._wait()
        finally:
            self.close()

    def result(self) -> Completion:
        """Everything, once the answer has ended. Raises as `pieces` does."""
        while self._last is None:
            self._wait()
        self._raise_refusal()
        last, count = self._last, len(self._token_ids)
        busy_s = last.prefill_s + last.decode_s
        choice = Choice(0, "".join(self._texts), tuple(self._token_ids), str(self._reason))
        return Completion(
            choices=(choice,),
            text=choice.text,
            token_ids=choice.token_ids,
            finish_reason=choice.finish_reason,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=count,
            prompt_tokens_per_s=self.prompt_tokens / last.prefill_s if last.prefill_s > 0 else 0.0,
            tokens_per_s=(count - 1) / last.decode_s if last.decode_s > 0 and count > 1 else 0.0,
            ring_share=last.ring_s / busy_s if busy_s > 0 else 0.0,
        )

    def close(self) -> None:
        """End the request if it runs, and wait until the engine has let go of it. Idempotent."""
        if self._reason is None and self._last is None:
            self._end(StopReason.CANCELED, tell_engine=True)
        while self._last is None and self._request in self._session._live:
            self._session._pump()

    def __enter__(self) -> Generation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _wait(self) -> None:
        self._session._pump()
        self._raise_refusal()

    def _raise_refusal(self) -> None:
        if self._last is not None and self._last.error is not None:
            raise RequestError(self._last.error)

    def _feed(self, output: Output) -> None:
        """Take the engine's news: tokens become text until the answer has ended."""
        if output.error is not None or output.finish_reason is not None:
            self._last = output
        if output.error is not None or self._reason is not None:
            return
        # The token that stopped the engine is no part of the text, special or not.
        silent = len(output.tokens) - 1 if output.finish_reason is StopReason.STOP else len(output.tokens)
        text = []
        for index, token in enumerate(output.tokens):
            self._token_ids.append(token)
            if self._detokenizer is not None and index < silent:
                text.append(self._stops.push(self._detokenizer.push((token,))))
            if self._stops.found is not None:
                break
        if self._stops.found is not None:
            self._end(StopReason.STOP, "".join(text), tell_engine=output.finish_reason is None)
        elif output.finish_reason is not None:
            if self._detokenizer is not None:
                text.append(self._stops.push(self._detokenizer.finish()) + self._stops.finish())
            self._end(output.finish_reason, "".join(text), tell_engine=False)
        elif self._detokenizer is None or any(text):
            self._tell("".join(text))

    def _end(self, reason: StopReason, text: str = "", *, tell_engine: bool) -> None:
        self._reason = reason
        self._tell(text)
        if tell_engine:
            self._session._cancel(self._request)

    def _tell(self, text: str) -> None:
        self._texts.append(text)
        tokens = tuple(self._token_ids[self._told :])
        self._told = len(self._token_ids)
        self._pieces.append(Piece(text, tokens, None if self._reason is None else str(self._reason)))


def _ids(prompt: Sequence[int]) -> list[int]:
    """Plain integers; numpy's are welcome too."""
    try:
        return [operator.index(token) for token in prompt]
    except TypeError:
        raise RequestError("a prompt is a text or a list of token ids, which are whole numbers.") from None


def _check(tokens: list[int], ready: Ready) -> None:
    if not tokens:
        raise RequestError("the prompt is empty; give at least one token.")
    if len(tokens) >= ready.context:
        raise RequestError(
            f"the prompt has {len(tokens):,} tokens and the context holds {ready.context:,}, the answer included; "
            "shorten it, or give --context more."
        )
    wrong = next((token for token in tokens if not 0 <= token < ready.vocabulary), None)
    if wrong is not None:
        raise RequestError(f"{wrong} is no token id; this model has 0 to {ready.vocabulary - 1:,}.")

"""From text to an engine: what a request asks for, in token ids. Knows one engine, no terminal and no HTTP.

    text or messages -> token ids -> engine -> tokens -> text, piece by piece

Any thread and any event loop may use a session, and any number of its requests may run at once.
"""

from __future__ import annotations

import operator
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ringlm.cluster.messages import Embedding, Output, Progress, Ready, Recovering, Stats
from ringlm.engine.request import SamplingParams, TokenLogprob
from ringlm.errors import ModelError, RequestError, RingLMError
from ringlm.frontend.answer import Logprob
from ringlm.frontend.generation import Generation
from ringlm.frontend.params import check_tokens, for_engine
from ringlm.frontend.reply import Reply
from ringlm.frontend.stops import StopStrings
from ringlm.frontend.switchboard import Engine, Switchboard
from ringlm.frontend.tools import enforcing
from ringlm.frontend.tools.formats import chosen_format
from ringlm.frontend.writer import Text, Writer

if TYPE_CHECKING:
    from ringlm.cluster.spec import EngineSpec
    from ringlm.frontend.conversation import Message, Tool
    from ringlm.frontend.model import Model
    from ringlm.frontend.tokenizer import Tokenizer
    from ringlm.frontend.tools.parser import AnswerParser


class Session:
    """A tokenizer and an engine, ready for requests. Ends every rank when it is closed, at the interpreter's end, or
    once nobody holds it and nothing runs."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer | None) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._switchboard = Switchboard(engine)
        self._taught = False  # whether the engine knows what tokens stand for, as grammars need
        self._teaching = threading.Lock()
        self._end = weakref.finalize(self, self._switchboard.close)

    @classmethod
    def start(
        cls,
        spec: EngineSpec,
        model: Model,
        on_progress: Callable[[Progress], None] | None = None,
        chat_template: Path | None = None,
        tool_format: str | None = None,
    ) -> Session:
        """Start an engine and read the tokenizer meanwhile, with another template than its own, or another format of
        calls than that has, where they are given. Raises the RingLMError that ended either."""
        from ringlm.cluster.client import EngineClient
        from ringlm.frontend.tokenizer import Tokenizer

        calling = None if tool_format is None else chosen_format(tool_format)
        with ThreadPoolExecutor(1, thread_name_prefix="ringlm-tokenizer") as pool:
            tokenizer = pool.submit(Tokenizer.open, model, chat_template, calling)
            engine = EngineClient.start(spec, on_progress)
            try:
                return cls(engine, tokenizer.result())
            except BaseException:
                engine.close()
                raise

    @property
    def ready(self) -> Ready:
        """What the engine said when it was ready, the last time: world size, context, devices."""
        return self._engine.ready

    @property
    def recovering(self) -> Recovering | None:
        """Why the ring is being formed again, while it is; requests go on then."""
        return self._engine.recovering

    @property
    def failure(self) -> RingLMError | None:
        """What has ended the engine, if it has ended."""
        return self._switchboard.failure

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises ModelError for a model that has none."""
        if self._tokenizer is None:
            raise ModelError(
                f"{self.ready.model} has no tokenizer (tokenizer.json), so it takes token ids only; "
                "copy the tokenizer's files into the model's folder."
            )
        return self._tokenizer

    def stats(self) -> Stats | None:
        """How the engine does: the newest figures, a second old at most while it works; None before the first."""
        return self._engine.stats

    def complete(self, prompt: str | Sequence[int], params: SamplingParams) -> Generation:
        """Go on from a text or from token ids. Raises RequestError for a prompt that cannot be used."""
        asked = params.structured_outputs
        grammar = None if asked is None else self.tokenizer.text_grammar(asked)
        return self._submit(self._tokens(prompt), params, grammar, continues=True)

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams,
        *,
        tools: Sequence[Tool] = (),
        tool_choice: str | Mapping[str, Any] = "auto",
        parallel_tool_calls: bool = True,
        **template_variables: Any,
    ) -> Generation:
        """Answer a conversation in the model's chat template, with OpenAI's `tools` at hand: with the `tool_choice`
        'auto' or 'none', or necessarily with calls of them, 'required', or of the one that is named. Raises
        RequestError, ModelError."""
        offered = () if tool_choice == "none" else tools
        calls = enforcing.Choice.of("auto" if tool_choice == "none" else tool_choice, parallel_tool_calls)
        if calls.required and not offered:
            raise RequestError(f"tool_choice is {tool_choice!r:.80}, and there are no tools.")
        tokens = self.tokenizer.chat(messages, offered, **template_variables)
        grammar = self.tokenizer.answer_grammar(params.structured_outputs, tokens, offered, calls)
        parser = partial(self.tokenizer.answer_parser, tokens, offered)
        return self._submit(tokens, params, grammar, continues=False, parser=parser)

    def embed(self, prompt: str | Sequence[int]) -> Reply[Embedding]:
        """The vector of a text or of token ids. Raises RequestError as `complete` does."""
        tokens = self._tokens(prompt)
        self._check_prompt(tokens)
        reply: Reply[Embedding] = Reply()

        def listen(news: Output | Embedding | RingLMError) -> None:
            if isinstance(news, Embedding):
                reply.set_result(news)
            elif isinstance(news, RingLMError):
                reply.set_exception(news)

        self._switchboard.ask(partial(self._engine.embed, tokens), listen)
        return reply

    def close(self) -> None:
        """End every rank; requests under way end with a RingError. Idempotent."""
        self._end()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _tokens(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        try:
            return [operator.index(token) for token in prompt]  # numpy's are welcome too
        except TypeError:
            raise RequestError("a prompt is a text or a list of token ids, which are whole numbers.") from None

    def _check_prompt(self, tokens: list[int]) -> None:
        if not tokens:
            raise RequestError("the prompt is empty; give at least one token.")
        if len(tokens) >= self.ready.context:
            raise RequestError(
                f"the prompt has {len(tokens):,} tokens and the context holds {self.ready.context:,}, the answer "
                "included; shorten it, or give --context more."
            )
        check_tokens(tokens, self.ready.vocabulary)

    def _submit(
        self,
        tokens: list[int],
        params: SamplingParams,
        grammar: str | None,
        continues: bool,
        parser: Callable[[], AnswerParser | None] = lambda: None,
    ) -> Generation:
        """`continues`: the text goes on from a prompt; `parser` makes one for each answer, all of which follow
        `grammar`."""
        self._check_prompt(tokens)
        asked = for_engine(params, self._tokenizer, self.ready.vocabulary, grammar)
        if grammar is not None:
            self._teach()
        writers = []
        for index in range(len(asked)):
            text = None
            if self._tokenizer is not None:
                parsing = parser()
                detokenizer = self._tokenizer.detokenizer(continues, parsing.markers if parsing else frozenset())
                text = Text(detokenizer, StopStrings(params.stop), params.min_tokens, parsing)
            writers.append(Writer(index, text, None if params.logprobs is None else self._named))
        generation = Generation(len(tokens), params, writers, self._cancel)
        try:
            for writer, each in zip(writers, asked, strict=True):
                listener = partial(generation.hear, writer)
                generation.requests.append(self._switchboard.ask(partial(self._engine.submit, tokens, each), listener))
        except BaseException:
            generation.cancel()
            raise
        return generation

    def _teach(self) -> None:
        with self._teaching:
            if not self._taught:
                self._engine.teach(self.tokenizer.vocabulary(self.ready.vocabulary))
                self._taught = True

    def _cancel(self, request: int) -> None:
        self._switchboard.cancel(request)  # a method of the session's, so that it lives while its requests do

    def _named(self, told: TokenLogprob) -> Logprob:
        """A token's logprob in words; they are empty without a tokenizer."""

        def named(token: int, logprob: float, top: tuple[Logprob, ...] = ()) -> Logprob:
            data = b"" if self._tokenizer is None else self._tokenizer.spelling(token)
            return Logprob(token, data.decode(errors="replace"), data, logprob, top)

        return named(told.token, told.logprob, tuple(named(*likely) for likely in told.top))

"""The Python interface: `LLM`. Knows prompts and conversations; the engine runs in processes of its own.

with LLM("demo", tensor_parallel=2) as llm:
    print(llm.generate("Once upon a time")[0].text)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal, overload

from ringlm.engine.request import SamplingParams
from ringlm.frontend.answer import Completion, Piece
from ringlm.frontend.batch import Params, Prompts, embeddings, generations, vector
from ringlm.frontend.model_api import ModelApi
from ringlm.frontend.session import Session

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ringlm.frontend.conversation import ChatOptions, Message, Tool


class LLM(ModelApi):
    """A model, ready to generate, on one rank or many.

    `model`: a Hugging Face folder, a GGUF file, a hub id, or 'demo'. Without a ring in the environment
    it starts `tensor_parallel` ranks on this machine (1 when left out). With one (RING_*, or
    torchrun's) rank 0 returns; the others serve it and leave by SystemExit with status 0 at its end.
    `split` has one weight a rank; `context` is in tokens, prompt and answer together. `chat_template` is a file that
    takes the place of the model's own template, `tool_format` of the format of calls that it has (docs/tools.md);
    `adapter` is the folder of a LoRA adapter. A lost rank ends all; with
    `rejoin_timeout` it is awaited for so many seconds, and then the others go on without it where the model fits them.

    Raises ConfigError, ModelError, or the RingError that kept the ring from forming. Any thread may use it. Its
    processes end with `close`, with the `with` block, or with this process at the latest.
    """

    def _begin(self, start: Callable[[], Session]) -> None:
        self._started = start()

    def generate(self, prompts: Prompts, sampling_params: Params = None) -> list[Completion]:
        """Go on from each prompt, a string or a list of token ids; all of them at once.

        `sampling_params`: one for all, or one each. Raises RequestError, and then ends all of them.
        """
        with ExitStack() as stack:
            return [generation.result() for generation in generations(self._session, prompts, sampling_params, stack)]

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        stream: Literal[False] = False,
        **options: Unpack[ChatOptions],
    ) -> Completion: ...

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        stream: Literal[True],
        **options: Unpack[ChatOptions],
    ) -> Iterator[Piece]: ...

    def chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        stream: bool = False,
        tools: Sequence[Tool] = (),
        tool_choice: str | Mapping[str, Any] = "auto",
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Completion | Iterator[Piece]:
        """Answer a conversation of {"role", "content"} messages: whole, or with `stream` piece by piece.

        `tools` are OpenAI's {"type": "function", "function": …}; the answer's `choices` have its calls of them.
        Ending a stream early ends the request. Raises RequestError, and ModelError for a model
        without a tokenizer or a chat template.
        """
        params, variables = sampling_params or SamplingParams(), chat_template_kwargs or {}
        generation = self._session.chat(messages, params, tools=tools, tool_choice=tool_choice, **variables)
        if stream:
            return generation.pieces()
        with generation:
            return generation.result()

    def embed(self, prompts: Prompts) -> list[list[float]]:
        """The vector of each prompt, of length 1: the model's last hidden state after it. Raises RequestError."""
        return [vector(reply.result()) for reply in embeddings(self._session, prompts)]

    def close(self) -> None:
        """End every rank. Idempotent."""
        self._session.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

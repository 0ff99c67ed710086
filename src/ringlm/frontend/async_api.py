"""The Python interface for an event loop: `AsyncLLM`.

async with AsyncLLM("demo", tensor_parallel=2) as llm:
    async for piece in llm.chat([{"role": "user", "content": "Hi"}], stream=True):
        print(piece.text, end="")
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
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
    from ringlm.frontend.generation import Generation


class AsyncLLM(ModelApi):
    """`LLM` for an event loop: the same arguments, the same results. It starts, without holding the loop up, at the
    beginning of an `async with` block, or by `await llm.start()`, which raise what LLM does; in a notebook:

    llm = await AsyncLLM("demo").start()
    """

    def _begin(self, start: Callable[[], Session]) -> None:
        self._start = start

    async def start(self) -> AsyncLLM:
        """Start every rank; the AsyncLLM itself."""
        if self._started is None:
            self._started = await asyncio.to_thread(self._start)
        return self

    async def generate(self, prompts: Prompts, sampling_params: Params = None) -> list[Completion]:
        """As `LLM.generate`; ends all of them when it is cancelled."""
        with ExitStack() as stack:
            running = generations(self._session, prompts, sampling_params, stack)
            return [await generation.completion() for generation in running]

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        stream: Literal[False] = False,
        **options: Unpack[ChatOptions],
    ) -> Awaitable[Completion]: ...

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        stream: Literal[True],
        **options: Unpack[ChatOptions],
    ) -> AsyncIterator[Piece]: ...

    def chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        stream: bool = False,
        tools: Sequence[Tool] = (),
        tool_choice: str | Mapping[str, Any] = "auto",
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Awaitable[Completion] | AsyncIterator[Piece]:
        """As `LLM.chat`: `await` it, or with `stream` iterate over it, which is when it begins."""
        params, variables = sampling_params or SamplingParams(), chat_template_kwargs or {}

        def begin() -> Generation:
            return self._session.chat(messages, params, tools=tools, tool_choice=tool_choice, **variables)

        return _streamed(begin) if stream else _whole(begin)

    async def embed(self, prompts: Prompts) -> list[list[float]]:
        """As `LLM.embed`."""
        return [vector(await reply) for reply in embeddings(self._session, prompts)]

    async def close(self) -> None:
        """End every rank. Idempotent."""
        if self._started is not None:
            await asyncio.to_thread(self._started.close)

    async def __aenter__(self) -> AsyncLLM:
        return await self.start()

    async def __aexit__(self, *error: object) -> None:
        await self.close()


async def _streamed(begin: Callable[[], Generation]) -> AsyncIterator[Piece]:
    async with begin() as generation:
        async for piece in generation:
            yield piece


async def _whole(begin: Callable[[], Generation]) -> Completion:
    async with begin() as generation:
        return await generation.completion()

"""The Python interface: `LLM`. Knows prompts and conversations; the engine runs in processes of its own.

with LLM("demo", tensor_parallel=2) as llm:
    print(llm.generate("Once upon a time")[0].text)
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from numbers import Integral
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, cast, overload

from ringlm.engine.request import SamplingParams
from ringlm.errors import ConfigError, RequestError
from ringlm.frontend.answer import Completion, Piece
from ringlm.frontend.model import resolve
from ringlm.frontend.session import Session
from ringlm.frontend.settings import engine_spec, ring_from_env

if TYPE_CHECKING:
    from ringlm.frontend.conversation import Message

Prompt = str | Sequence[int]


class LLM:
    """A model, ready to generate, on one rank or many.

    `model`: a Hugging Face folder, a GGUF file, a hub id, or 'demo'. Without a ring in the environment
    it starts `tensor_parallel` ranks on this machine (1 when left out). With one (RING_*, or
    torchrun's) rank 0 returns; the others serve it and leave by SystemExit with status 0 at its end.
    `split` has one weight a rank; `context` is in tokens, prompt and answer together. `chat_template` is a file that
    takes the place of the model's own template, `adapter` the folder of a LoRA adapter.

    Raises ConfigError, ModelError, or the RingError that kept the ring from forming. Use it from one
    thread, as a context manager or with `close`.
    """

    def __init__(
        self,
        model: str,
        tensor_parallel: int | None = None,
        backend: str = "ring",
        device: str = "auto",
        dtype: str = "auto",
        quant: str = "none",
        context: int | None = None,
        split: Sequence[float] | None = None,
        chat_template: str | Path | None = None,
        adapter: str | Path | None = None,
    ) -> None:
        ring = ring_from_env()
        if tensor_parallel is not None and tensor_parallel < 1:
            raise ConfigError(f"tensor_parallel is {tensor_parallel}; it must be 1 or more.")
        if ring is not None and tensor_parallel not in (None, ring.world_size):
            raise ConfigError(
                f"tensor_parallel is {tensor_parallel}, but the environment describes a ring of "
                f"{ring.world_size}; leave it out, or unset RING_* (or torchrun's variables)."
            )
        files = resolve(str(model))
        spec = engine_spec(
            files,
            ring=ring,
            local_ranks=1 if ring is not None else tensor_parallel or 1,
            backend=backend,
            device=device,
            dtype=dtype,
            quant=quant,
            split=split,
            context=context,
            adapter=adapter,
        )
        if ring is not None and ring.rank != 0:
            from ringlm.cluster.client import run_rank

            sys.exit(run_rank(spec))
        self._session = Session.start(spec, files, chat_template=None if chat_template is None else Path(chat_template))

    @property
    def world_size(self) -> int:
        return self._session.ready.world_size

    @property
    def context(self) -> int:
        """How many tokens a prompt and its answer may have together."""
        return self._session.ready.context

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Go on from each prompt, a string or a list of token ids; all of them at once.

        `sampling_params`: one for all, or one each. Raises RequestError, and then ends all of them.
        """
        batch = _as_batch(prompts)
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            params = [sampling_params or SamplingParams()] * len(batch)
        else:
            params = list(sampling_params)
            if len(params) != len(batch):
                raise RequestError(f"{len(batch)} prompts came with {len(params)} sampling_params; give one each.")
        with contextlib.ExitStack() as stack:
            running = [
                stack.enter_context(self._session.complete(prompt, each))
                for prompt, each in zip(batch, params, strict=True)
            ]
            return [generation.result() for generation in running]

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        stream: Literal[False] = False,
    ) -> Completion: ...

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        stream: Literal[True],
    ) -> Iterator[Piece]: ...

    def chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        stream: bool = False,
    ) -> Completion | Iterator[Piece]:
        """Answer a conversation of {"role", "content"} messages: whole, or with `stream` piece by piece.

        Ending a stream early ends the request. Raises RequestError, and ModelError for a model
        without a tokenizer or a chat template.
        """
        generation = self._session.chat(messages, sampling_params or SamplingParams())
        if stream:
            return generation.pieces()
        with generation:
            return generation.result()

    def close(self) -> None:
        """End every rank. Idempotent."""
        self._session.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A single prompt is a batch of one."""
    if isinstance(prompts, str):
        return [prompts]
    numbers, others = [], []
    for item in prompts:
        if isinstance(item, Integral):
            numbers.append(int(item))
        else:
            others.append(cast("Prompt", item))
    if numbers and others:
        raise RequestError("the prompts mix numbers with texts or lists; one prompt of token ids is a list of its own.")
    return [numbers] if numbers else others

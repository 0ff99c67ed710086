"""Many prompts through one session, in order, without more of them at once than its engine lets wait."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from numbers import Integral
from typing import TYPE_CHECKING, cast

from ringlm.cluster.messages import Embedding
from ringlm.engine.request import SamplingParams
from ringlm.errors import RequestError

if TYPE_CHECKING:
    from ringlm.frontend.generation import Generation
    from ringlm.frontend.reply import Reply
    from ringlm.frontend.session import Session

Prompt = str | Sequence[int]
Prompts = Prompt | Sequence[Prompt]
Params = SamplingParams | Sequence[SamplingParams] | None

_AT_ONCE = 128  # answers, or vectors


def generations(session: Session, prompts: Prompts, sampling_params: Params, stack: ExitStack) -> Iterator[Generation]:
    """Each prompt's generation when it is to be waited for, in order, with as many of the next under way as may be.
    What is under way when `stack` ends is cancelled."""
    batch = _as_batch(prompts)
    if sampling_params is None or isinstance(sampling_params, SamplingParams):
        params = [sampling_params or SamplingParams()] * len(batch)
    else:
        params = list(sampling_params)
        if len(params) != len(batch):
            raise RequestError(f"{len(batch)} prompts came with {len(params)} sampling_params; give one each.")
    running: deque[Generation] = deque()
    for prompt, each in zip(batch, params, strict=True):
        while running and sum(len(one.requests) for one in running) + (each.best_of or each.n) > _AT_ONCE:
            yield running.popleft()
        running.append(stack.enter_context(session.complete(prompt, each)))
    yield from running


def embeddings(session: Session, prompts: Prompts) -> Iterator[Reply[Embedding]]:
    """Each prompt's vector, likewise."""
    running: deque[Reply[Embedding]] = deque()
    for prompt in _as_batch(prompts):
        if len(running) == _AT_ONCE:
            yield running.popleft()
        running.append(session.embed(prompt))
    yield from running


def vector(embedding: Embedding) -> list[float]:
    """Its numbers."""
    return array("f", embedding.vector).tolist()


def _as_batch(prompts: Prompts) -> list[Prompt]:
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

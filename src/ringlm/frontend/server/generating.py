"""From a request for text to the session's answers: begun off the event loop, followed to their end, ended when the
client leaves."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, NamedTuple, TypeVar

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from ringlm.engine.request import StopReason
from ringlm.errors import RingLMError
from ringlm.frontend.answer import Completion, Piece
from ringlm.frontend.generation import Generation
from ringlm.frontend.metrics import RequestMetrics
from ringlm.frontend.server.access import record
from ringlm.frontend.server.service import Service
from ringlm.frontend.server.sse import cancelled, until_gone

_T = TypeVar("_T")


class Begun(NamedTuple):
    """A generation under way, and what times it."""

    generation: Generation
    watch: RequestMetrics


@contextlib.asynccontextmanager
async def begun(service: Service, starts: Sequence[Callable[[], Generation]]) -> AsyncIterator[list[Begun]]:
    """Generations under way, all ended at the end of the block. They are begun on a thread: a long prompt takes the
    tokenizer a while."""
    watches = [service.metrics.started() for _ in starts]
    running: list[Generation] = []
    over = threading.Event()

    def begin() -> None:
        for start in starts:
            if over.is_set():
                return
            running.append(start())
            if over.is_set():  # meanwhile
                running[-1].cancel()

    try:
        await run_in_threadpool(begin)
    except RingLMError as error:
        watches[len(running)].failed(type(error).__name__)
        raise
    else:
        yield [Begun(*pair) for pair in zip(running, watches, strict=True)]
    finally:
        over.set()
        for generation in running:
            generation.cancel()


async def followed(
    service: Service,
    request: Request,
    each: Begun,
    on_piece: Callable[[Piece], Awaitable[None]] | None = None,
    piecewise: bool = True,
) -> Completion:
    """The whole of a generation, each piece of which `on_piece` gets as it comes; the log and the metrics learn of it.
    One of which the best answers are chosen at its end is not `piecewise`."""
    told, (generation, watch) = record(request), each
    told.prompt_tokens += generation.prompt_tokens
    try:
        if piecewise:
            async for piece in generation:
                told.completion_tokens += len(piece.token_ids)
                watch.tokens(len(piece.token_ids), piece.index)
                if on_piece is not None:
                    await on_piece(piece)
        completion = await generation.completion()
    except RingLMError as error:
        watch.failed(type(error).__name__)
        raise
    except asyncio.CancelledError:
        service.metrics.finished(str(StopReason.CANCELED))
        raise
    if not piecewise:
        told.completion_tokens += completion.completion_tokens
    watch.finished(completion.finish_reason, completion.queue_s)
    return completion


async def together(works: Sequence[Coroutine[Any, Any, _T]]) -> list[_T]:
    """What all of them give; the first error ends the others."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await cancelled(*tasks)


async def unless_gone(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """The response that `work` makes; it is cancelled when the client hangs up."""
    task, client = asyncio.ensure_future(work), asyncio.ensure_future(until_gone(request.receive))
    try:
        await asyncio.wait({task, client}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
    finally:
        await cancelled(task, client)
    record(request).outcome = "its client left"
    return Response(status_code=499)  # which nobody receives; the log's readers know it from nginx

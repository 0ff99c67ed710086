"""POST /v1/chat/completions: a conversation's next turn, whole or streamed."""

from __future__ import annotations

import time
from functools import partial

from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from ringlm.frontend.answer import Completion, Piece
from ringlm.frontend.server import chat_schema as schema
from ringlm.frontend.server.access import record
from ringlm.frontend.server.generating import begun, followed, unless_gone
from ringlm.frontend.server.responses import encoded
from ringlm.frontend.server.schemas import Usage
from ringlm.frontend.server.service import Service
from ringlm.frontend.server.sse import EventStream, Write
from ringlm.frontend.server.turns import Turn


async def chat_completions(request: Request, service: Service) -> Response:
    """Answer a conversation in the model's chat template."""
    asked, fields = await service.read(request, schema.ChatRequest)
    answer = _Answer(service, request, Turn.of(asked, fields))
    return EventStream(answer.stream, service.awaited) if asked.stream else await unless_gone(request, answer.whole())


class _Answer:
    """One request on its way."""

    def __init__(self, service: Service, request: Request, turn: Turn) -> None:
        self._service, self._request = service, request
        self._start = partial(turn.begin, service)
        self._usage = turn.asked.include_usage  # which refuses options of a stream without one
        self._calls = turn.calls
        self._id = f"chatcmpl-{record(request).id}"
        self._created = int(time.time())

    async def whole(self) -> Response:
        async with begun(self._service, [self._start]) as (each,):
            completion = await followed(self._service, self._request, each)
        answer = schema.ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._service.model,
            choices=[schema.ChatChoice.of(choice, self._calls) for choice in completion.choices],
            usage=_usage(completion),
        )
        return encoded(answer)

    async def stream(self, write: Write) -> None:
        introduced: set[int] = set()

        async def on_piece(piece: Piece) -> None:
            if piece.index not in introduced:
                introduced.add(piece.index)
                await write(
                    self._chunk(schema.ChunkChoice(index=piece.index, delta=schema.Delta(role="assistant", content="")))
                )
            delta = schema.Delta.of(piece, self._calls)
            if delta is not None:
                logprobs = schema.Logprobs.of(piece.logprobs)
                await write(self._chunk(schema.ChunkChoice(index=piece.index, delta=delta, logprobs=logprobs)))
            if piece.finish_reason is not None:
                end = schema.ChunkChoice(index=piece.index, delta=schema.Delta(), finish_reason=piece.finish_reason)
                await write(self._chunk(end))

        async with begun(self._service, [self._start]) as (each,):
            completion = await followed(self._service, self._request, each, on_piece)
        if self._usage:
            await write(self._chunk(usage=_usage(completion)))

    def _chunk(self, *choices: schema.ChunkChoice, usage: Usage | None = None) -> schema.ChatChunk:
        return schema.ChatChunk(
            id=self._id,
            created=self._created,
            model=self._service.model,
            choices=list(choices),
            usage=usage if self._usage else UNSET,
        )


def _usage(completion: Completion) -> Usage:
    return Usage.of(completion.prompt_tokens, completion.completion_tokens, completion.cached_tokens)

"""POST /v1/completions: texts and token ids, gone on with; whole or streamed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, ClassVar, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from ringlm.engine.request import MAX_CHOICES, MAX_LOGPROBS
from ringlm.frontend.answer import Choice, Completion, Logprob, Piece
from ringlm.frontend.generation import Generation
from ringlm.frontend.server.access import record
from ringlm.frontend.server.errors import APIError
from ringlm.frontend.server.generating import Begun, begun, followed, together, unless_gone
from ringlm.frontend.server.responses import encoded
from ringlm.frontend.server.schemas import Prompts, Sampling, Usage, prompts
from ringlm.frontend.server.service import Service
from ringlm.frontend.server.sse import EventStream, Write


class CompletionRequest(Sampling, kw_only=True):
    """Prompts to go on from: a text, token ids, or a list of either."""

    refused: ClassVar[dict[str, str]] = Sampling.refused | {"suffix": "texts are continued at their end only"}

    prompt: Prompts
    best_of: Annotated[
        Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None,
        Meta(description="Write so many and give the n likeliest; not in streams unless it is n."),
    ] = None
    echo: Annotated[bool | None, Meta(description="Give the prompt before the answer; not with logprobs.")] = None
    logprobs: Annotated[
        Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None,
        Meta(description="So many of the likeliest beside each token."),
    ] = None


class CompletionLogprobs(msgspec.Struct):
    """By token: its text, its logarithm of probability, the likeliest in its place, where its text begins."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]

    @classmethod
    def of(cls, logprobs: Sequence[Logprob], offset: int) -> CompletionLogprobs | None:
        """`offset` is that of the first in its answer, in characters."""
        if not logprobs:
            return None
        offsets = []
        for each in logprobs:
            offsets.append(offset)
            offset += len(each.text)
        return cls(
            [each.text for each in logprobs],
            [each.logprob for each in logprobs],
            [{top.text: top.logprob for top in each.top} for each in logprobs],
            offsets,
        )


class CompletionChoice(msgspec.Struct, kw_only=True):
    """One of the answers, or in a stream what an event adds to it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None


class CompletionResponse(msgspec.Struct, kw_only=True):
    """All answers, those to the first prompt first; in a stream an event."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET


async def completions(request: Request, service: Service) -> Response:
    """Go on from prompts as they are, without a chat template."""
    asked, _ = await service.read(request, CompletionRequest)
    answers = _Answers(service, request, asked)
    return EventStream(answers.stream, service.awaited) if asked.stream else await unless_gone(request, answers.whole())


class _Answers:
    """One request on its way, a generation for each prompt."""

    def __init__(self, service: Service, request: Request, asked: CompletionRequest) -> None:
        self._service, self._request = service, request
        self._prompts = prompts(asked.prompt, "prompt")
        self._n = asked.n or 1
        self._params = asked.params(service.session.ready.context)
        self._echo = bool(asked.echo)
        if self._echo and asked.logprobs is not None:
            raise APIError(400, "echo with logprobs is not supported: those of prompts are not told.", param="echo")
        self._usage = asked.include_usage
        self._id = f"cmpl-{record(request).id}"
        self._created = int(time.time())

    async def whole(self) -> Response:
        async with begun(self._service, self._starts()) as running:
            piecewise = self._params.best_of in (None, self._params.n)
            works = [followed(self._service, self._request, each, piecewise=piecewise) for each in running]
            completed = await together(works)
        choices = [self._choice(number, choice) for number, each in enumerate(completed) for choice in each.choices]
        return encoded(self._response(*choices, usage=_usage(completed)))

    async def stream(self, write: Write) -> None:
        async with begun(self._service, self._starts()) as running:
            completed = await together([self._follow(number, each, write) for number, each in enumerate(running)])
        if self._usage:
            await write(self._response(usage=_usage(completed)))

    async def _follow(self, number: int, each: Begun, write: Write) -> Completion:
        """Write what comes of prompt `number`."""
        offsets: dict[int, int] = {}  # where the next token of each answer begins

        async def on_piece(piece: Piece) -> None:
            before = self._before(number) if piece.index not in offsets else ""
            offset = offsets.get(piece.index, 0)
            offsets[piece.index] = offset + sum(len(logprob.text) for logprob in piece.logprobs)
            choice = CompletionChoice(
                index=number * self._n + piece.index,
                text=before + piece.text,
                logprobs=CompletionLogprobs.of(piece.logprobs, offset),
                finish_reason=piece.finish_reason,
            )
            await write(self._response(choice))

        return await followed(self._service, self._request, each, on_piece)

    def _starts(self) -> list[Callable[[], Generation]]:
        return [partial(self._service.session.complete, prompt, self._params) for prompt in self._prompts]

    def _before(self, number: int) -> str:
        """What an answer to prompt `number` begins with."""
        prompt = self._prompts[number]
        if not self._echo:
            return ""
        return prompt if isinstance(prompt, str) else self._service.session.tokenizer.decode(prompt)

    def _choice(self, number: int, choice: Choice) -> CompletionChoice:
        return CompletionChoice(
            index=number * self._n + choice.index,
            text=self._before(number) + choice.text,
            logprobs=CompletionLogprobs.of(choice.logprobs, 0),
            finish_reason=choice.finish_reason,
        )

    def _response(self, *choices: CompletionChoice, usage: Usage | None = None) -> CompletionResponse:
        return CompletionResponse(
            id=self._id,
            created=self._created,
            model=self._service.model,
            choices=list(choices),
            usage=UNSET if usage is None and not self._usage else usage,
        )


def _usage(completed: Sequence[Completion]) -> Usage:
    return Usage.of(
        sum(each.prompt_tokens for each in completed),
        sum(each.completion_tokens for each in completed),
        sum(each.cached_tokens for each in completed),
    )

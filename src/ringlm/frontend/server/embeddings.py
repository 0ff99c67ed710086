"""POST /v1/embeddings: texts as vectors."""

from __future__ import annotations

import base64
from typing import Annotated, ClassVar, Literal

import msgspec
from msgspec import Meta
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from ringlm.cluster.messages import Embedding
from ringlm.errors import RingLMError
from ringlm.frontend.batch import vector
from ringlm.frontend.server.access import record
from ringlm.frontend.server.generating import together, unless_gone
from ringlm.frontend.server.responses import encoded
from ringlm.frontend.server.schemas import OfModel, Prompts, prompts
from ringlm.frontend.server.service import Service


class EmbeddingRequest(OfModel, kw_only=True):
    """Texts, or token ids, whose vectors are wanted."""

    refused: ClassVar[dict[str, str]] = {"dimensions": "vectors are as long as the model's states"}

    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None
    user: Annotated[str | None, Meta(description="Ignored.")] = None


class EmbeddingItem(msgspec.Struct, kw_only=True):
    """The vector of input number `index`, of length 1: numbers, or float32 bytes (little-endian) as base64."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(msgspec.Struct):
    """Counts of tokens."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingResponse(msgspec.Struct, kw_only=True):
    """A vector for each input, in order."""

    object: Literal["list"] = "list"
    data: list[EmbeddingItem]
    model: str
    usage: EmbeddingUsage


async def embeddings(request: Request, service: Service) -> Response:
    """Turn texts into vectors: the model's normalized state after the last token."""
    asked, _ = await service.read(request, EmbeddingRequest)
    return await unless_gone(request, _embed(request, service, asked))


async def _embed(request: Request, service: Service, asked: EmbeddingRequest) -> Response:
    def tokenized() -> list[list[int]]:
        inputs = prompts(asked.input, "input")
        return [service.session.tokenizer.encode(each) if isinstance(each, str) else each for each in inputs]

    async def embedded(tokens: list[int]) -> Embedding:
        return await service.session.embed(tokens)

    tokens = await run_in_threadpool(tokenized)
    count = record(request).prompt_tokens = sum(map(len, tokens))
    try:
        vectors = await together([embedded(each) for each in tokens])
    except RingLMError as error:
        service.metrics.failed(type(error).__name__)
        raise
    as_text = asked.encoding_format == "base64"
    shown = [base64.b64encode(each.vector).decode() if as_text else vector(each) for each in vectors]
    return encoded(
        EmbeddingResponse(
            data=[EmbeddingItem(index=index, embedding=each) for index, each in enumerate(shown)],
            model=service.model,
            usage=EmbeddingUsage(count, count),
        )
    )

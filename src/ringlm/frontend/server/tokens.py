"""POST /tokenize and /detokenize: the model's tokenizer, in the shape of vLLM's server."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from ringlm.errors import RequestError
from ringlm.frontend.server.chat_schema import Message, Tool
from ringlm.frontend.server.errors import APIError
from ringlm.frontend.server.responses import encoded
from ringlm.frontend.server.schemas import OfModel, TokenId
from ringlm.frontend.server.service import Service


class TokenizeRequest(OfModel, kw_only=True):
    """A text, or a conversation, which is put into the chat template."""

    prompt: str | None = None
    add_special_tokens: Annotated[bool, Meta(description="With those that begin every text, such as BOS.")] = True
    messages: Annotated[list[Message], Meta(min_length=1, max_length=4096)] | None = None
    tools: Annotated[list[Tool], Meta(max_length=128)] | None = None


class TokenizeResponse(msgspec.Struct, kw_only=True):
    """`max_model_len` is the context: how many tokens a prompt and its answer may have."""

    count: int
    max_model_len: int
    tokens: list[int]


class DetokenizeRequest(OfModel, kw_only=True):
    """Token ids."""

    tokens: list[TokenId]


class DetokenizeResponse(msgspec.Struct, kw_only=True):
    """Their text, without special tokens."""

    prompt: str


async def tokenize(request: Request, service: Service) -> Response:
    """Tell the token ids of a text or a conversation."""
    asked, fields = await service.read(request, TokenizeRequest)
    if (asked.prompt is None) == (asked.messages is None):
        raise APIError(400, "give either prompt or messages.", param="prompt")
    session = service.session

    def encode() -> list[int]:
        if asked.prompt is not None:
            return session.tokenizer.encode(asked.prompt, special=asked.add_special_tokens)
        return session.tokenizer.chat(fields["messages"], tools=fields.get("tools") or ())

    tokens = await run_in_threadpool(encode)
    return encoded(TokenizeResponse(count=len(tokens), max_model_len=session.ready.context, tokens=tokens))


async def detokenize(request: Request, service: Service) -> Response:
    """Tell the text of token ids."""
    asked, _ = await service.read(request, DetokenizeRequest)
    vocabulary = service.session.ready.vocabulary
    if any(token >= vocabulary for token in asked.tokens):
        raise RequestError(f"a token id is out of range; this model has 0 to {vocabulary - 1:,}.")
    text = await run_in_threadpool(service.session.tokenizer.decode, asked.tokens)
    return encoded(DetokenizeResponse(prompt=text))

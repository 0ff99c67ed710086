"""The ASGI application: which endpoint answers where, behind keys, errors, CORS and the access log."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from ringlm.errors import RingLMError
from ringlm.frontend.server import pages, status
from ringlm.frontend.server.access import AccessLog
from ringlm.frontend.server.auth import Keys
from ringlm.frontend.server.chat import chat_completions
from ringlm.frontend.server.chat_schema import ChatChunk, ChatCompletion, ChatRequest
from ringlm.frontend.server.completions import CompletionRequest, CompletionResponse, completions
from ringlm.frontend.server.embeddings import EmbeddingRequest, EmbeddingResponse, embeddings
from ringlm.frontend.server.errors import APIError, on_error
from ringlm.frontend.server.messages_api import count_tokens, create_message
from ringlm.frontend.server.messages_schema import (
    CountTokensRequest,
    MessageEvent,
    MessageObject,
    MessagesRequest,
    TokenCount,
)
from ringlm.frontend.server.openapi import Endpoint, document
from ringlm.frontend.server.responses import encoded
from ringlm.frontend.server.responses_api import (
    count_input_tokens,
    create_response,
    delete_response,
    retrieve_response,
)
from ringlm.frontend.server.responses_schema import (
    Deleted,
    InputRequest,
    InputTokens,
    ResponseEvent,
    ResponseObject,
    ResponsesRequest,
)
from ringlm.frontend.server.service import Service
from ringlm.frontend.server.tokens import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
    detokenize,
    tokenize,
)

ENDPOINTS = (
    Endpoint("POST", "/v1/chat/completions", chat_completions, ChatRequest, ChatCompletion, ChatChunk),
    Endpoint("POST", "/v1/completions", completions, CompletionRequest, CompletionResponse, CompletionResponse),
    Endpoint("POST", "/v1/responses", create_response, ResponsesRequest, ResponseObject, ResponseEvent),
    Endpoint("GET", "/v1/responses/{id}", retrieve_response, gives=ResponseObject),
    Endpoint("DELETE", "/v1/responses/{id}", delete_response, gives=Deleted),
    Endpoint("POST", "/v1/responses/input_tokens", count_input_tokens, InputRequest, InputTokens),
    Endpoint("POST", "/v1/messages", create_message, MessagesRequest, MessageObject, MessageEvent),
    Endpoint("POST", "/v1/messages/count_tokens", count_tokens, CountTokensRequest, TokenCount),
    Endpoint("POST", "/v1/embeddings", embeddings, EmbeddingRequest, EmbeddingResponse),
    Endpoint("POST", "/tokenize", tokenize, TokenizeRequest, TokenizeResponse),
    Endpoint("POST", "/detokenize", detokenize, DetokenizeRequest, DetokenizeResponse),
    Endpoint("GET", "/v1/models", status.models, gives=status.Models),
    Endpoint("GET", "/v1/models/{id:path}", status.model, gives=status.Model),
    Endpoint("GET", "/v1/ring", status.ring, gives=status.RingReport),
    Endpoint("GET", "/health", status.health, gives=status.Health),
    Endpoint("GET", "/metrics", status.metrics),
)


def build(service: Service, keys: Sequence[bytes] = (), origins: Sequence[str] = ()) -> ASGIApp:
    """The application. With `keys`, all but /health and the page needs one; pages from `origins` may call it from
    browsers."""
    api = document(ENDPOINTS, needs_key=bool(keys))
    front = pages.front()
    shown = front | {"/docs": pages.docs(api), "/openapi.json": encoded(api)}
    routes = [Route(path, partial(_fixed, response=response)) for path, response in shown.items()]
    routes += [
        Route(each.path, partial(_answer, endpoint=each, service=service), methods=[each.method]) for each in ENDPOINTS
    ]
    middleware = [Middleware(Keys, keys=keys, open_to_all={"/health", *front})]
    if origins:
        shared = ["X-Request-Id", "Retry-After"]
        cors = Middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=shared,
        )
        middleware.insert(0, cors)  # a browser asks whether it may ask, and shows no key then
    app = Starlette(
        routes=routes,
        middleware=middleware,
        exception_handlers=dict.fromkeys((APIError, RingLMError, HTTPException, Exception), on_error),
    )
    app.router.redirect_slashes = False
    return AccessLog(app)


async def _answer(request: Request, endpoint: Endpoint, service: Service) -> Response:
    return await endpoint.answer(request, service)


async def _fixed(request: Request, response: Response) -> Response:
    return response

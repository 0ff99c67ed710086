"""Errors and their statuses, as clients read them: OpenAI's `{"error": {"message", "type", "param", "code"}}`, and
below /v1/messages Anthropic's `{"type": "error", "error": {"type", "message"}}`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from ringlm.errors import ModelError, QueueFullError, RequestError, RingLMError
from ringlm.frontend.server.responses import encoded

RETRY_AFTER_S = 1  # a place in the queue is free after the next answer, of which many end in a second

# By status: OpenAI's type, and the code that a status alone tells.
_KINDS: dict[int, tuple[str, str | None]] = {
    401: ("authentication_error", "invalid_api_key"),
    404: ("not_found_error", None),
    429: ("rate_limit_error", "queue_full"),
    503: ("service_unavailable_error", "ring_lost"),
}
# By status, Anthropic's type.
_MESSAGES_KINDS = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
}


class ErrorInfo(msgspec.Struct, frozen=True):
    """What went wrong; `param` names the field that did it, where one did."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(msgspec.Struct, frozen=True):
    """Every answer with a status of 400 or more, and the last event of a stream that failed."""

    error: ErrorInfo


class MessagesErrorInfo(msgspec.Struct, frozen=True):
    """What went wrong."""

    type: str
    message: str


class MessagesErrorResponse(msgspec.Struct, frozen=True):
    """Every answer below /v1/messages with a status of 400 or more, and the last event of a stream that failed."""

    error: MessagesErrorInfo
    type: Literal["error"] = "error"


class APIError(Exception):
    """A request that is answered with `status`."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}
        default = ("invalid_request_error", None) if status < 500 else ("server_error", None)
        kind, usual = _KINDS.get(status, default)
        self.info = ErrorInfo(message, kind, param, code or usual)

    def body(self, path: str = "") -> ErrorResponse | MessagesErrorResponse:
        """What a client of `path` is told."""
        if error_kind(path) is ErrorResponse:
            return ErrorResponse(self.info)
        usual = "invalid_request_error" if self.status < 500 else "api_error"
        return MessagesErrorResponse(MessagesErrorInfo(_MESSAGES_KINDS.get(self.status, usual), self.info.message))


def error_kind(path: str) -> type[ErrorResponse] | type[MessagesErrorResponse]:
    """How errors of `path` are told."""
    return MessagesErrorResponse if path.startswith("/v1/messages") else ErrorResponse


def api_error(error: BaseException) -> APIError:
    """What a client is told of any error; of one that nobody foresaw, nothing of its inside."""
    match error:
        case APIError():
            return error
        case QueueFullError():
            return APIError(429, str(error), headers={"Retry-After": str(RETRY_AFTER_S)})
        case RequestError() | ModelError():  # such as a model that has no chat template
            return APIError(400, str(error))
        case RingLMError():
            return APIError(503, str(error))
        case HTTPException(status_code=404):
            return APIError(404, "there is no such endpoint; GET /docs shows those there are.")
        case HTTPException(status_code=405):
            allowed = (error.headers or {}).get("Allow", "")
            return APIError(405, f"this endpoint takes {allowed} only.", headers=error.headers)
        case HTTPException():
            return APIError(error.status_code, error.detail, headers=error.headers)
        case _:
            return APIError(500, "the server made a mistake; its log says more.")


def error_response(error: BaseException, path: str) -> Response:
    """`api_error` as a response to a request for `path`."""
    told = api_error(error)
    return encoded(told.body(path), told.status, told.headers)


async def on_error(request: Request, error: Exception) -> Response:
    """Starlette's handler of every error."""
    return error_response(error, request.url.path)

"""Around every request: its id, and one line in the log when it has ended."""

from __future__ import annotations

import logging
import re
import time
import uuid
from dataclasses import dataclass, field

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_ID = re.compile(r"[\w.:/+=-]{1,128}", re.ASCII)

log = logging.getLogger("ringlm.access")


@dataclass
class Record:
    """What the log tells of a request; endpoints fill in what they learn."""

    id: str
    started: float = field(default_factory=time.perf_counter)
    status: int = 500  # until a response begins
    prompt_tokens: int = 0
    completion_tokens: int = 0
    outcome: str = ""  # where the status does not tell


def record(request: Request) -> Record:
    """The record of a request under way."""
    found: Record = request.scope["ringlm.record"]
    return found


class AccessLog:
    """Gives every request an id, its client's X-Request-Id where there is one, and logs it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        told = scope["ringlm.record"] = Record(given if _ID.fullmatch(given) else uuid.uuid4().hex)

        async def with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                told.status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = headers["Request-Id"] = told.id  # for OpenAI's clients, and Anthropic's
            await send(message)

        structlog.contextvars.bind_contextvars(request_id=told.id)  # of this request's task alone
        try:
            await self._app(scope, receive, with_id)
        finally:
            # Those who watch ask every few seconds, and say nothing about the server's work.
            level = logging.DEBUG if scope["path"] in ("/health", "/metrics", "/v1/ring") else logging.INFO
            fields: dict[str, object] = {"status": told.status}
            if told.outcome:
                fields["outcome"] = told.outcome
            fields |= {
                "prompt_tokens": told.prompt_tokens,
                "completion_tokens": told.completion_tokens,
                "ms": round((time.perf_counter() - told.started) * 1e3),
            }
            log.log(level, "%s %s", scope["method"], scope["path"], extra=fields)

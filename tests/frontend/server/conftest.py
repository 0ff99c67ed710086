"""A server of this process: the application on a session whose engine says what a test tells it to."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient
from starlette.types import ASGIApp

from ringlm.frontend.metrics import Metrics
from ringlm.frontend.server.app import build
from ringlm.frontend.server.monitor import Monitor
from ringlm.frontend.server.requests import Bodies
from ringlm.frontend.server.service import Service
from ringlm.frontend.session import Session
from ringlm.frontend.tokenizer import Tokenizer
from tests.frontend.fake import EOS, FakeEngine
from tests.frontend.tools import templates

ANSWER = "Paris, naïve 😀."
HI = [{"role": "user", "content": "Hi"}]


class Served:
    """An application and what it stands on."""

    def __init__(self, session: Session, keys: tuple[bytes, ...], origins: tuple[str, ...], max_body: int) -> None:
        self.metrics = Metrics(session.ready)
        service = Service(
            session, ("fake", "alias/x"), Bodies(max_body), self.metrics, Monitor(session, self.metrics), 1_700_000_000
        )
        self.session = session
        self.app: ASGIApp = build(service, keys, origins)
        self.client = TestClient(self.app, raise_server_exceptions=False)

    def post(self, path: str, **fields: Any) -> Any:
        """The body of a response that must be well."""
        response = self.client.post(path, json=fields)
        assert response.status_code == 200, response.text
        return response.json()

    def events(self, path: str, **fields: Any) -> list[Any]:
        """What a stream tells; it must end with [DONE], which is left out."""
        response = self.client.post(path, json={"stream": True, **fields})
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        events = response.text.split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


Serve = Callable[..., Served]


@pytest.fixture
def serve(tokenizer: Tokenizer) -> Iterator[Serve]:
    """Makes servers, which end with the test."""
    with contextlib.ExitStack() as stack:

        def make(
            engine: FakeEngine,
            *,
            keys: tuple[bytes, ...] = (),
            origins: tuple[str, ...] = (),
            max_body: int = 100_000,
            speaks: Tokenizer | None = tokenizer,
        ) -> Served:
            session = stack.enter_context(Session(engine, speaks))
            served = Served(session, keys, origins, max_body)
            stack.enter_context(served.client)
            return served

        yield make


@pytest.fixture
def engine(tokenizer: Tokenizer) -> FakeEngine:
    """Says ANSWER to everything."""
    return FakeEngine(lambda _: [*tokenizer.encode(ANSWER), EOS])


@pytest.fixture(scope="session")
def able(tokenizer: Tokenizer) -> Tokenizer:
    """One whose template knows tools and reasoning."""
    fast = copy.deepcopy(tokenizer._fast)
    fast.chat_template = templates.QWEN_THINKING
    return Tokenizer(fast, "able")


@pytest.fixture
def served(serve: Serve, engine: FakeEngine) -> Served:
    return serve(engine)

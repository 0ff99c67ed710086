"""Clients that leave, read slowly or wait long; errors in the middle of a stream."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from itertools import repeat
from typing import Any

import pytest

from ringlm.cluster.messages import Recovering
from ringlm.errors import PeerLostError
from ringlm.frontend.server import requests, sse
from tests.frontend.fake import FakeEngine, until
from tests.frontend.server.conftest import HI, Serve, Served

CHAT = "/v1/chat/completions"


class Client:
    """One request by hand: what the application sends, and a client that may leave or read nothing."""

    def __init__(self, served: Served, path: str = CHAT, sends: bool = True, **fields: Any) -> None:
        self.sent: list[dict[str, Any]] = []
        self.gone = asyncio.Event()
        self.reads = asyncio.Event()
        self.reads.set()
        body = {"type": "http.request", "body": json.dumps(fields).encode(), "more_body": False}
        self._body = [body] if sends else []
        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
        }
        self.task = asyncio.ensure_future(served.app(scope, self._receive, self._send))  # type: ignore[arg-type]

    @property
    def text(self) -> str:
        return b"".join(message.get("body", b"") for message in self.sent).decode()

    async def until(self, condition: Callable[[], object]) -> None:
        for _ in range(1000):
            if condition():
                return
            await asyncio.sleep(0.005)
        raise AssertionError(f"in vain; {self.text}")

    async def _receive(self) -> dict[str, Any]:
        if self._body:
            return self._body.pop()
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        await self.reads.wait()
        self.sent.append(message)


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 20))  # type: ignore[arg-type]


@pytest.fixture
def endless() -> FakeEngine:
    """Says the same word for ever."""
    return FakeEngine(lambda _: repeat(253), delay_s=0.01, context=1_000_000)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_request(serve: Serve, endless: FakeEngine, stream: bool) -> None:
    served = serve(endless)

    async def scenario() -> None:
        client = Client(served, messages=HI, stream=stream, n=2)
        await client.until(lambda: len(endless.submitted) == 2)
        if stream:
            await client.until(lambda: client.text.count("data:") > 5)
        client.gone.set()
        await client.task

    run(scenario)
    until(lambda: endless.running == [])
    assert set(endless.canceled) == {1, 2}
    assert 'finish_reason="canceled"} 1' in served.client.get("/metrics").text


@pytest.mark.parametrize(("path", "fields"), [("responses", {"input": "Hi"}), ("messages", {"max_tokens": 10**6})])
@pytest.mark.parametrize("stream", [False, True])
def test_one_who_leaves_another_api(
    serve: Serve, endless: FakeEngine, path: str, fields: dict[str, Any], stream: bool
) -> None:
    served = serve(endless)

    async def scenario() -> None:
        client = Client(served, f"/v1/{path}", **{"messages": HI} | fields, stream=stream)
        await client.until(lambda: client.text.count("delta") > 5 if stream else endless.submitted)
        client.gone.set()
        await client.task

    run(scenario)
    until(lambda: endless.running == [])
    assert endless.canceled
    assert 'finish_reason="canceled"} 1' in served.client.get("/metrics").text


class SilentEngine(FakeEngine):
    """Takes requests and says nothing until it is told to."""

    silent = True

    def next_event(self, timeout_s: float | None = None) -> Any:
        until(lambda: not self.silent or self.closed)
        return super().next_event(timeout_s)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_while_it_waits(serve: Serve, stream: bool) -> None:
    engine = SilentEngine(lambda _: [5])
    served = serve(engine)

    async def scenario() -> None:
        client = Client(served, "/v1/completions", prompt=["a", "b"], stream=stream)
        await client.until(lambda: len(engine.submitted) == 2)
        client.gone.set()
        await client.task
        assert all(message.get("status") in (None, 499) for message in client.sent)

    run(scenario)
    assert set(engine.canceled) == {1, 2}


def test_a_long_wait_is_kept_alive(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "KEEP_ALIVE_S", 0.05)
    monkeypatch.setattr(sse, "LOOK_S", 0.05)
    engine = SilentEngine(lambda _: [5, 6])
    served = serve(engine)

    async def scenario() -> None:
        client = Client(served, messages=HI, stream=True)
        await client.until(lambda: client.text.count(": nothing new\n\n") > 2)
        engine.silent = False
        await client.task
        assert client.sent[0]["status"] == 200
        assert client.text.endswith("data: [DONE]\n\n")

    run(scenario)


def test_a_stream_says_for_which_rank_it_waits(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "LOOK_S", 0.02)
    engine = SilentEngine(lambda _: [5, 6])
    engine.recovering = Recovering(1, "rank 1 is lost.")
    served = serve(engine)

    async def scenario() -> None:
        client = Client(served, messages=HI, stream=True)
        await client.until(lambda: client.text.count(": waiting for rank 1\n\n") > 2)
        engine.recovering = None
        engine.silent = False
        await client.task
        assert client.text.endswith("data: [DONE]\n\n")

    run(scenario)


def test_a_body_that_does_not_come(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "BODY_S", 0.05)

    async def scenario() -> None:
        late, gone = Client(served, sends=False), Client(served, sends=False)
        gone.gone.set()
        await asyncio.gather(late.task, gone.task)
        assert late.sent[0]["status"] == 408

    run(scenario)


def test_an_error_in_mid_stream(serve: Serve) -> None:
    lost = PeerLostError("rank 1 is lost.", 1)
    served = serve(FakeEngine(lambda _: repeat(253), fail_after=8, failure=lost, context=1_000_000))
    response = served.client.post(CHAT, json={"messages": HI, "stream": True})
    assert response.status_code == 200
    *events, last, end = response.text.split("\n\n")
    assert len(events) > 2
    assert end == ""
    error = json.loads(last.removeprefix("data: "))["error"]
    assert (error["message"], error["code"]) == ("rank 1 is lost.", "ring_lost")


def test_a_slow_reader_holds_up_nobody(serve: Serve, endless: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    endless._delay_s = 0.001
    served = serve(endless)

    async def scenario() -> None:
        slow = Client(served, messages=HI, stream=True)
        await slow.until(lambda: len(slow.sent) > 3)
        slow.reads.clear()
        taken = len(slow.sent)
        quick = Client(served, messages=HI, max_tokens=100)
        await quick.task
        assert quick.sent[0]["status"] == 200
        assert len(slow.sent) == taken
        slow.reads.set()
        await slow.until(lambda: len(slow.sent) > taken + 1)
        # What it missed came as few large events, not as one a token.
        assert max(len(message.get("body", b"")) for message in slow.sent[taken : taken + 3]) > 400
        # One that takes nothing at all is given up.
        monkeypatch.setattr(sse, "KEEP_ALIVE_S", 0.05)
        monkeypatch.setattr(sse, "LOOK_S", 0.05)
        monkeypatch.setattr(sse, "STALL_S", 0.1)
        stuck = Client(served, messages=HI, stream=True)
        stuck.reads.clear()
        await stuck.task
        slow.gone.set()
        await slow.task

    run(scenario)
    until(lambda: endless.running == [])

"""Hundreds of requests of all kinds, a good part of them broken or broken off: each is answered as it should be, and in
the end nothing of them is left on any rank."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx2
import psutil

from tests.frontend.server.ring import serving
from tests.tiny import save_speaking_llama

COUNT, AT_ONCE = 500, 24
WORDS = ["w5", "w90", "w17", "w33", "river", "tree", "blue", "seven"]
WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": WEATHER}}]
PENALTIES = {
    "temperature": 0.7, "top_p": 0.9, "min_p": 0.02, "top_k": 50, "presence_penalty": 1, "frequency_penalty": 0.5,
    "repetition_penalty": 1.2, "logit_bias": {"5": -100}, "logprobs": True, "top_logprobs": 3,
}  # fmt: skip
BAD: list[dict[str, Any] | bytes] = [
    b"{", b"[]", b"\xff\xfe", {"temperature": -1}, {"messages": []}, {"n": 10**9}, {"model": "another"},
    {"messages": [{"role": "user", "content": "word " * 20_000}]},
]  # fmt: skip


class Clients:
    """What they ask, and that the answers are right."""

    def __init__(self, client: httpx2.AsyncClient) -> None:
        self._client = client
        self._random = random.Random(7)
        self._kinds: list[Callable[[dict[str, Any]], Coroutine[Any, Any, None]]] = [
            self.whole, self.stream, self.stream_that_is_left, self.whole_that_is_left, self.bad, self.penalties,
            self.tools, self.several, self.completions, self.embeddings,
        ]  # fmt: skip

    async def all(self, count: int) -> None:
        turns = asyncio.Semaphore(AT_ONCE)

        async def one() -> None:
            async with turns:
                body = {
                    "messages": [{"role": "user", "content": self._text(120)}],
                    "max_tokens": self._random.randrange(1, 40),
                    "temperature": self._random.choice([0, 0.8]),
                }
                await self._random.choice(self._kinds)(body)

        await asyncio.gather(*(one() for _ in range(count)))

    async def whole(self, body: dict[str, Any]) -> None:
        answer = await self._ask("/v1/chat/completions", body)
        assert 1 <= answer["usage"]["completion_tokens"] <= body["max_tokens"]

    async def stream(self, body: dict[str, Any]) -> None:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        async with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = [line async for line in response.aiter_lines() if line.startswith("data: ")]
        assert lines[-1] == "data: [DONE]"
        assert json.loads(lines[-2].removeprefix("data: "))["usage"]["completion_tokens"] >= 1

    async def stream_that_is_left(self, body: dict[str, Any]) -> None:
        left = self._random.randrange(12)
        async with self._client.stream(
            "POST", "/v1/chat/completions", json=body | {"stream": True, "max_tokens": 400}
        ) as response:
            assert response.status_code == 200
            async for _ in response.aiter_lines():
                left -= 1
                if left < 0:
                    break

    async def whole_that_is_left(self, body: dict[str, Any]) -> None:
        with contextlib.suppress(httpx2.TimeoutException):
            patience_s = self._random.uniform(0.05, 0.5)
            await self._client.post("/v1/chat/completions", json=body | {"max_tokens": 400}, timeout=patience_s)

    async def bad(self, body: dict[str, Any]) -> None:
        wrong = self._random.choice(BAD)
        content = wrong if isinstance(wrong, bytes) else json.dumps(body | wrong).encode()
        headers = {"Content-Type": "application/json"}
        response = await self._client.post("/v1/chat/completions", content=content, headers=headers)
        assert 400 <= response.status_code < 500
        assert response.json()["error"]["message"]

    async def penalties(self, body: dict[str, Any]) -> None:
        answer = await self._ask("/v1/chat/completions", body | PENALTIES)
        assert len(answer["choices"][0]["logprobs"]["content"]) == answer["usage"]["completion_tokens"]

    async def tools(self, body: dict[str, Any]) -> None:
        response = await self._client.post("/v1/chat/completions", json=body | {"tools": TOOLS})
        assert response.status_code == 400  # its template knows none
        assert "tools" in response.json()["error"]["message"]
        await self._ask("/v1/chat/completions", body | {"tools": TOOLS, "tool_choice": "none"})

    async def several(self, body: dict[str, Any]) -> None:
        answer = await self._ask("/v1/chat/completions", body | {"n": 3, "temperature": 1})
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]

    async def completions(self, body: dict[str, Any]) -> None:
        answer = await self._ask("/v1/completions", {"prompt": [self._text(5), self._text(50)], "max_tokens": 8})
        assert [choice["index"] for choice in answer["choices"]] == [0, 1]

    async def embeddings(self, body: dict[str, Any]) -> None:
        answer = await self._ask("/v1/embeddings", {"input": [self._text(5), self._text(9)]})
        assert [len(vector["embedding"]) for vector in answer["data"]] == [36, 36]

    async def _ask(self, path: str, body: dict[str, Any]) -> Any:
        response = await self._client.post(path, json=body)
        assert response.status_code == 200, response.text
        return response.json()

    def _text(self, most: int) -> str:
        return " ".join(self._random.choices(WORDS, k=self._random.randrange(1, most)))


def held(launcher: int) -> dict[int, tuple[int, int]]:
    """By process of the ring its threads and open descriptors."""
    processes = [psutil.Process(launcher), *psutil.Process(launcher).children(recursive=True)]
    return {process.pid: (process.num_threads(), process.num_fds()) for process in processes}


def test_nothing_is_left_of_many_requests(tmp_path: Path) -> None:
    async def ask(count: int) -> None:
        async with httpx2.AsyncClient(base_url=url.removesuffix("/v1"), timeout=100) as client:
            await Clients(client).all(count)

    model = save_speaking_llama(tmp_path / "model")
    with serving("--context", "2048", "--quant", "int4", model=str(model)) as (launcher, url):
        asyncio.run(ask(AT_ONCE))  # threads that are kept are begun
        time.sleep(1)
        before = held(launcher.pid)
        asyncio.run(ask(COUNT))
        deadline = time.monotonic() + 90
        while True:  # connections close, and figures come once a second
            ring = httpx2.get(f"{url}/ring").json()
            quiet = ring["running"] == ring["waiting"] == ring["cache"]["in_use"] == 0
            after = held(launcher.pid)
            # A pool keeps a thread for each that came at once.
            grown = [
                pid
                for pid, (threads, descriptors) in before.items()
                if pid in after and (after[pid][0] > threads + AT_ONCE or after[pid][1] > descriptors)
            ]
            if quiet and not grown and after.keys() == before.keys():
                break
            assert time.monotonic() < deadline, (ring, before, after)
            time.sleep(0.5)

"""A server that speaks OpenAI's API, seen from outside: what it serves, and when the parts of an answer come.

Knows no ringlm: any such server will do. Prompts are random words, so that no server has seen them before.
"""

from __future__ import annotations

import dataclasses
import random
import time
from typing import Any, NamedTuple

import httpx2
import msgspec

from ringlm.errors import ConfigError, RingLMError

_CONNECT_S = 10.0
_READ_S = 600.0  # between two parts of an answer
_WORDS = [
    "time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state",
    "family", "student", "group", "country", "problem", "hand", "part", "place", "case", "week", "company",
    "system", "program", "question", "work", "number", "night", "point", "home", "water", "room", "mother", "area",
    "money", "story", "fact", "month", "lot", "right", "study", "book", "eye", "job", "word", "business", "issue",
    "side", "kind", "head", "house", "service", "friend", "father", "power",
]  # fmt: skip


Prompt = str | list[dict[str, str]]  # of completions a text; of chat a text or messages


class Failure(Exception):
    """A request failed. `kind` is 'http 429', 'connection', 'timeout', 'error in the stream', 'cut off', 'empty' or
    'unreadable'."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Answer(NamedTuple):
    """When a request began, when each part that has text came, and when it ended (`perf_counter`); what was said, and
    how many tokens it and the prompt have."""

    began: float
    parts: list[float]
    ended: float
    text: str
    prompt_tokens: int
    tokens: int

    @property
    def first_s(self) -> float:
        """To the first part."""
        return self.parts[0] - self.began


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Chunk(msgspec.Struct):
    """What is read of an answer, streamed or whole; `error` has no one shape."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


class _Served(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Served]


_chunk = msgspec.json.Decoder(_Chunk)


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """One model of one server, as `find` finds it. `api` is 'completions' or 'chat/completions'."""

    client: httpx2.AsyncClient
    model: str
    api: str
    extras: dict[str, Any]  # what keeps an answer going, where the server knows it
    words: int = 1  # of a prompt

    def prompt(self) -> str:
        """A text that nobody has seen before, of `words` words."""
        return " ".join(random.choices(_WORDS, k=self.words))

    async def answer(self, prompt: Prompt, tokens: int, parts: list[float] | None = None) -> Answer:
        """Stream one answer of `tokens` tokens; who gives `parts` sees it fill. Raises Failure."""
        body = self._body(prompt, tokens) | {"stream": True, "stream_options": {"include_usage": True}}
        parts = [] if parts is None else parts
        began, texts, usage, over = time.perf_counter(), list[str](), _Usage(), False
        try:
            async with self.client.stream("POST", self.api, json=body) as response:
                if response.status_code != 200:
                    raise Failure(f"http {response.status_code}", _said(await response.aread()))
                async for line in response.aiter_lines():
                    if not line.startswith("data:"):
                        continue
                    now, data = time.perf_counter(), line[5:].strip()
                    if data == "[DONE]":
                        over = True
                        break
                    chunk = _chunk.decode(data)
                    if chunk.error is not None:
                        raise Failure("error in the stream", _said(data.encode()))
                    usage = chunk.usage or usage
                    over = over or any(choice.finish_reason is not None for choice in chunk.choices)
                    text = "".join(map(_text, chunk.choices))
                    if text:
                        parts.append(now)
                        texts.append(text)
        except httpx2.TimeoutException as error:
            raise Failure("timeout", f"nothing came for {_READ_S:.0f} s") from error
        except httpx2.RequestError as error:
            raise Failure("connection", str(error) or type(error).__name__) from error
        except msgspec.MsgspecError as error:
            raise Failure("unreadable", f"the stream is not as OpenAI's: {error}") from error
        if not over:
            raise Failure("cut off", "the stream ended before its answer did")
        if not parts:
            raise Failure("empty", "no text came")
        ended, count = time.perf_counter(), usage.completion_tokens or len(parts)
        return Answer(began, parts, ended, "".join(texts), usage.prompt_tokens, count)

    async def sized(self, prompt_tokens: int) -> Endpoint:
        """With prompts of about so many tokens, as the server counts them: from what two sizes take."""
        few, many = max(4, prompt_tokens // 8), max(16, prompt_tokens // 2)
        low, high = [await dataclasses.replace(self, words=words)._counted() for words in (few, many)]
        a_word = (high - low) / (many - few)
        if low < 1 or a_word <= 0:
            raise ConfigError(
                "the server does not say in usage.prompt_tokens how long a prompt was; it cannot be used."
            )
        return dataclasses.replace(self, words=max(1, round((prompt_tokens - low) / a_word) + few))

    async def _counted(self) -> int:
        response = await self.ask()
        _check(response)
        usage = _parse(response, _Chunk).usage
        return usage.prompt_tokens if usage is not None else 0

    async def ask(self) -> httpx2.Response:
        """What the server says to a request for one token, not streamed. Raises RingLMError where it says nothing."""
        try:
            return await self.client.post(self.api, json=self._body(self.prompt(), 1))
        except httpx2.RequestError as error:
            raise RingLMError(f"the server does not answer a request: {error or type(error).__name__}.") from error

    def _body(self, prompt: Prompt, tokens: int) -> dict[str, Any]:
        said: dict[str, Any] = {"prompt": prompt}
        if self.api != "completions":
            said = {"messages": [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt}
        return {"model": self.model, "max_tokens": tokens, "temperature": 0, **said, **self.extras}


def connect(url: str, api_key: str | None) -> httpx2.AsyncClient:
    """A client for the server whose API begins at `url`. Raises ConfigError."""
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    try:
        base = httpx2.URL(url)
    except httpx2.InvalidURL:
        base = httpx2.URL()
    if base.scheme not in ("http", "https") or not base.host:
        raise ConfigError(f"--url {url} is not an address such as http://127.0.0.1:8000/v1.")
    timeout = httpx2.Timeout(_READ_S, connect=_CONNECT_S)
    return httpx2.AsyncClient(
        base_url=base, headers=headers, timeout=timeout, limits=httpx2.Limits(max_connections=None)
    )


async def find(client: httpx2.AsyncClient, model: str | None) -> Endpoint:
    """The endpoint of `model`, or of the server's first one: completions if there are such, chat else.

    Raises ConfigError for what its user can mend, RingLMError for what the server cannot do.
    """
    try:
        response = await client.get("models")
    except httpx2.RequestError as error:
        raise ConfigError(f"nothing answers at {client.base_url}: {error}. Is the server started?") from error
    if response.status_code == 404:
        raise ConfigError(f"{response.url} is not there; does --url end where the API begins, as in …:8000/v1?")
    _check(response)
    served = [each.id for each in _parse(response, _Models).data]
    if not served or (model is not None and model not in served):
        raise ConfigError(f"the server has no model '{model or ''}', but {', '.join(served) or 'none'}; mend -m.")
    for api in ("completions", "chat/completions"):
        for extras in ({"ignore_eos": True}, dict[str, Any]()):
            endpoint = Endpoint(client, model or served[0], api, extras)
            response = await endpoint.ask()
            if response.status_code not in (400, 422):
                break
        if response.status_code not in (404, 405, 501):
            break
    _check(response)
    return endpoint


def _check(response: httpx2.Response) -> None:
    """Raises ConfigError or RingLMError unless the server did what it was asked."""
    status = response.status_code
    if status in (401, 403):
        raise ConfigError(f"the server refuses the key ({status}): {_said(response.content)} Give it with --api-key.")
    if status != 200:
        kind = ConfigError if status < 500 else RingLMError
        raise kind(f"the server answers {response.url} with {status}: {_said(response.content)}")


def _parse(response: httpx2.Response, kind: type[Any]) -> Any:
    try:
        return msgspec.json.decode(response.content, type=kind)
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{response.url} does not answer as OpenAI's API would: {error}.") from error


def _text(choice: _Choice) -> str:
    delta = choice.delta or _Delta()
    return choice.text or delta.content or delta.reasoning_content or ""


def _said(body: bytes) -> str:
    """What an error's body has to say: OpenAI's message, or its beginning as it is."""
    try:
        found = msgspec.json.decode(body)["error"]["message"]
    except (msgspec.MsgspecError, KeyError, TypeError):
        found = body.decode("utf-8", "replace")
    return " ".join(str(found).split())[:300]

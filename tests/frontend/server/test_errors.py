"""What is refused: by which status, which field is named, and that nothing of the inside is told."""

from __future__ import annotations

from typing import Any

import pytest

from ringlm.cluster.messages import Output
from ringlm.errors import PeerLostError
from ringlm.frontend.tokenizer import Tokenizer
from tests.frontend.fake import EOS, FakeEngine, until
from tests.frontend.server.conftest import HI, Serve, Served

CHAT, COMPLETE, EMBED = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
JSON = {"Content-Type": "application/json"}

REFUSED: list[tuple[str, dict[str, Any], str | None, str]] = [
    (CHAT, {}, None, "messages"),
    (CHAT, {"messages": []}, "messages", "length >= 1"),
    (CHAT, {"messages": "Hi"}, "messages", "Expected `array`"),
    (CHAT, {"messages": [{"content": "x"}]}, "messages", "role"),
    (CHAT, {"messages": HI, "temperature": 101}, "temperature", "<= 100"),
    (CHAT, {"messages": HI, "temperature": "hot"}, "temperature", "got `str`"),
    (CHAT, {"messages": HI, "top_p": 0}, "top_p", "> 0"),
    (CHAT, {"messages": HI, "n": 0}, "n", ">= 1"),
    (CHAT, {"messages": HI, "max_tokens": 0}, "max_tokens", ">= 1"),
    (CHAT, {"messages": HI, "max_tokens": 2, "min_tokens": 3}, None, "min_tokens is 3"),
    (CHAT, {"messages": HI, "seed": 1 << 64}, "seed", "seed"),
    (CHAT, {"messages": HI, "stop": ""}, "stop", "length >= 1"),
    (CHAT, {"messages": HI, "logit_bias": {"x": 1}}, "logit_bias", "Expected `int`"),
    (CHAT, {"messages": HI, "logit_bias": {"99999": 1}}, None, "99999 is no token id"),
    (CHAT, {"messages": HI, "tool_choice": "required"}, None, "there are no tools"),
    (CHAT, {"messages": HI, "tool_choice": {"type": "function"}}, None, "tool_choice is"),
    (CHAT, {"messages": HI, "tool_choice": "maybe"}, "tool_choice", "maybe"),
    (CHAT, {"messages": HI, "response_format": {"type": "json_schema"}}, "response_format", "needs json_schema"),
    (CHAT, {"messages": HI, "functions": []}, "functions", "not supported"),
    (CHAT, {"messages": HI, "guided_json": {"not": {}}}, None, "at #/not: 'not' cannot be enforced"),
    (CHAT, {"messages": HI, "guided_json": {}, "guided_regex": "a"}, "guided_regex", "send one"),
    (CHAT, {"messages": HI, "structured_outputs": {"regex": "a", "choice": ["a"]}}, None, "regex and choice"),
    (CHAT, {"messages": HI, "modalities": ["audio"]}, "modalities", "not supported"),
    (CHAT, {"messages": HI, "top_logprobs": 2}, "top_logprobs", "needs logprobs"),
    (CHAT, {"messages": HI, "stream_options": {"include_usage": 1}}, "stream_options", "got `int`"),
    (CHAT, {"messages": HI, "chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs", "chat_template"),
    (CHAT, {"messages": [{"role": "user", "content": "long " * 3000}]}, None, "the context holds 2,048"),
    (COMPLETE, {"prompt": ["x", 1]}, "prompt", "mixes"),
    (COMPLETE, {"prompt": [[]]}, "prompt", "length >= 1"),
    (COMPLETE, {"prompt": ""}, None, "the prompt is empty"),
    (COMPLETE, {"prompt": [49152]}, None, "49152 is no token id"),
    (COMPLETE, {"prompt": "x", "suffix": "y"}, "suffix", "not supported"),
    (COMPLETE, {"prompt": "x", "echo": True, "logprobs": 1}, "echo", "not supported"),
    (COMPLETE, {"prompt": "x", "logprobs": 21}, "logprobs", "<= 20"),
    (EMBED, {"input": "x", "dimensions": 3}, "dimensions", "not supported"),
    (EMBED, {"input": "x", "encoding_format": "int8"}, "encoding_format", "int8"),
    ("/tokenize", {}, "prompt", "either prompt or messages"),
    ("/detokenize", {"tokens": [49152]}, None, "out of range"),
    ("/detokenize", {"tokens": [-1]}, "tokens", ">= 0"),
]


@pytest.mark.parametrize(("path", "fields", "param", "words"), REFUSED)
@pytest.mark.parametrize("stream", [False, True])
def test_refusals(
    served: Served, engine: FakeEngine, path: str, fields: dict[str, Any], param: str | None, words: str, stream: bool
) -> None:
    response = served.client.post(path, json=fields | {"stream": True} if stream else fields)
    error = response.json()["error"]
    assert response.status_code == 400
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert set(error) == {"message", "type", "param", "code"}
    assert words in error["message"]
    assert engine.submitted == {}


BODIES: list[tuple[bytes, str]] = [
    (b"", "not valid JSON"),
    (b"[", "not valid JSON"),
    (b"[]", "must be a JSON object"),
    (b'{"messages": "\xff"}', "not valid JSON"),
    (b'{"temperature": NaN}', "not valid JSON"),
    (b'{"a": ' + b"[" * 5000, "not valid JSON"),
    (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "not valid JSON"),
]


@pytest.mark.parametrize(("body", "words"), BODIES)
def test_bodies_that_are_no_requests(served: Served, body: bytes, words: str) -> None:
    response = served.client.post(CHAT, content=body, headers=JSON)
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]


def test_options_of_a_stream_without_one(served: Served) -> None:
    response = served.client.post(CHAT, json={"messages": HI, "stream_options": {}})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "stream_options")


def test_size_and_kind_of_the_body(served: Served) -> None:
    assert served.client.post(CHAT, content=b"x" * 100_001, headers=JSON).status_code == 413
    chunked = served.client.post(CHAT, content=iter([b"x" * 60_000, b"x" * 60_000]), headers=JSON)
    assert chunked.status_code == 413
    assert "100,000 bytes" in chunked.json()["error"]["message"]
    form = served.client.post(CHAT, content=b"{}", headers={"Content-Type": "text/plain"})
    assert form.status_code == 415


def test_no_such_model_endpoint_or_method(served: Served) -> None:
    response = served.client.post(CHAT, json={"messages": HI, "model": "gpt"})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert "'fake' is" in response.json()["error"]["message"]
    assert served.client.get("/v1/models/gpt").status_code == 404
    assert served.client.get("/v2/models").json()["error"]["type"] == "not_found_error"
    method = served.client.get(CHAT)
    assert (method.status_code, method.headers["allow"]) == (405, "POST")
    assert "error" in method.json()


def test_keys(serve: Serve, engine: FakeEngine) -> None:
    served = serve(engine, keys=(b"first", b"second"), origins=("http://page.test",))
    for path in ("/v1/models", "/v1/ring", "/metrics", "/docs", "/openapi.json", "/v1/nothing"):
        refused = served.client.get(path)
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"] == "Bearer"
        assert refused.json()["error"]["code"] == "invalid_api_key"
    for given in ("first", "Bearer", "Bearer ", "Bearer third", "Bearer firs", "Basic first", "Bearer f\xefrst"):
        headers = {"Authorization": given.encode("latin-1")}
        assert served.client.post(CHAT, json={"messages": HI}, headers=headers).status_code == 401
    for given in ("Bearer first", "bearer second"):
        headers = {"Authorization": given}
        assert served.client.post(CHAT, json={"messages": HI}, headers=headers).status_code == 200
    for path in ("/health", "/", "/page/app.js"):  # the page is the same for everybody, and asks for a key
        assert served.client.get(path).status_code == 200


def test_pages_of_other_origins(serve: Serve, engine: FakeEngine) -> None:
    served = serve(engine, keys=(b"key",), origins=("http://page.test",))
    ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    allowed = served.client.options(CHAT, headers={"Origin": "http://page.test", **ask})
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "http://page.test"
    other = served.client.options(CHAT, headers={"Origin": "http://else.test", **ask})
    assert "access-control-allow-origin" not in other.headers


class BusyEngine(FakeEngine):
    """Has a full queue."""

    def next_event(self, timeout_s: float | None = None) -> Any:
        event = super().next_event(timeout_s)
        if not isinstance(event, Output):
            return event
        self._left.clear()
        return Output(event.id, [], error="256 requests wait; ask again later.", busy=True)


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue(serve: Serve, stream: bool) -> None:
    served = serve(BusyEngine(lambda _: [5, 6, 7, EOS]))
    response = served.client.post(CHAT, json={"messages": HI, "stream": stream})
    assert response.status_code == 429
    assert int(response.headers["retry-after"]) >= 1
    assert response.json()["error"]["code"] == "queue_full"
    assert 'kind="QueueFullError"} 1' in served.client.get("/metrics").text


@pytest.mark.parametrize("stream", [False, True])
def test_a_lost_ring(serve: Serve, stream: bool) -> None:
    served = serve(FakeEngine(lambda _: [5, 6, EOS], fail_after=0, failure=PeerLostError("rank 1 is lost.", 1)))
    until(lambda: served.session.failure)
    for response in (
        served.client.post(CHAT, json={"messages": HI, "stream": stream}),
        served.client.post(EMBED, json={"input": "x"}),
        served.client.get("/health"),
    ):
        assert response.status_code == 503
        assert response.json()["error"]["message"] == "rank 1 is lost."


def test_a_mistake_of_the_server_tells_nothing(
    served: Served, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(served.session, "chat", broken)
    response = served.client.post(CHAT, json={"messages": HI})
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert "secret" not in response.text
    assert response.headers["x-request-id"]


def test_a_model_that_cannot_chat(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tokenizer, "has_chat_template", False)
    response = served.client.post(CHAT, json={"messages": HI})
    assert response.status_code == 400
    assert "no chat template" in response.json()["error"]["message"]


def test_request_ids(served: Served) -> None:
    given = served.client.get("/health", headers={"X-Request-Id": "abc-1"})
    assert given.headers["x-request-id"] == "abc-1"
    for bad in ("a b", "x" * 200, "é"):
        made = served.client.get("/health", headers={"X-Request-Id": bad.encode("latin-1")})
        assert len(made.headers["x-request-id"]) == 32

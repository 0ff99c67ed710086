"""POST /v1/completions: prompts of every kind, several at once, echoes, logprobs."""

from __future__ import annotations

import pytest

from ringlm.frontend.tokenizer import Tokenizer
from tests.frontend.fake import EOS, FakeEngine
from tests.frontend.server.conftest import ANSWER, Serve, Served

COMPLETE = "/v1/completions"


@pytest.mark.parametrize(
    ("prompt", "count"), [("Once", 1), (["Once", "Twice"], 2), ([5, 6, 7], 1), ([[5, 6], [7]], 2), ([[5]], 1)]
)
def test_prompts(served: Served, engine: FakeEngine, tokenizer: Tokenizer, prompt: object, count: int) -> None:
    answer = served.post(COMPLETE, prompt=prompt)
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    shape = [{"index": i, "text": ANSWER, "logprobs": None, "finish_reason": "stop"} for i in range(count)]
    assert answer["choices"] == shape
    given = [prompt] if count == 1 and not isinstance(prompt[0], list) else prompt  # type: ignore[index]
    sent = [tokenizer.encode(each) if isinstance(each, str) else each for each in given]  # type: ignore[attr-defined]
    assert [tokens for tokens, _ in engine.submitted.values()] == sent
    assert answer["usage"]["prompt_tokens"] == sum(map(len, sent))
    assert answer["usage"]["completion_tokens"] == count * (len(tokenizer.encode(ANSWER)) + 1)


def test_a_stream_of_several(served: Served) -> None:
    events = served.events(COMPLETE, prompt=["Once", "Twice"], n=2, echo=True, stream_options={"include_usage": True})
    *events, last = events
    texts = dict.fromkeys(range(4), "")
    reasons = {}
    for event in events:
        (choice,) = event["choices"]
        texts[choice["index"]] += choice["text"]
        if choice["finish_reason"] is not None:
            reasons[choice["index"]] = choice["finish_reason"]
    assert texts == {0: "Once" + ANSWER, 1: "Once" + ANSWER, 2: "Twice" + ANSWER, 3: "Twice" + ANSWER}
    assert reasons == dict.fromkeys(range(4), "stop")
    assert last["choices"] == []
    assert last["usage"] == served.post(COMPLETE, prompt=["Once", "Twice"], n=2)["usage"]


def test_echo_of_token_ids(served: Served, tokenizer: Tokenizer) -> None:
    (choice,) = served.post(COMPLETE, prompt=tokenizer.encode("Once"), echo=True)["choices"]
    assert choice["text"] == "Once" + ANSWER


def test_logprobs(served: Served, tokenizer: Tokenizer) -> None:
    (choice,) = served.post(COMPLETE, prompt="Once", logprobs=1)["choices"]
    shown, tokens = choice["logprobs"], [*tokenizer.encode(ANSWER), EOS]
    assert shown["token_logprobs"] == [-token / 100 for token in tokens]
    assert [len(top) for top in shown["top_logprobs"]] == [1] * len(tokens)
    lengths = [len(token) for token in shown["tokens"]]
    assert shown["text_offset"] == [sum(lengths[:i]) for i in range(len(lengths))]
    streamed = [event["choices"][0]["logprobs"] for event in served.events(COMPLETE, prompt="Once", logprobs=1)]
    parts = [part for part in streamed if part is not None]
    assert len(parts) > 1
    for field in shown:
        assert [each for part in parts for each in part[field]] == shown[field]


def test_best_of(served: Served, engine: FakeEngine) -> None:
    answer = served.post(COMPLETE, prompt="Once", best_of=3)
    assert len(answer["choices"]) == 1
    assert len(engine.submitted) == 3
    refused = served.client.post(COMPLETE, json={"prompt": "Once", "best_of": 3, "stream": True})
    assert refused.status_code == 400


def test_a_model_without_a_tokenizer(serve: Serve) -> None:
    served = serve(FakeEngine(lambda _: [5, 6, EOS]), speaks=None)
    assert served.post(COMPLETE, prompt=[1, 2])["usage"]["completion_tokens"] == 3
    refused = served.client.post(COMPLETE, json={"prompt": "Once"})
    assert refused.status_code == 400
    assert "no tokenizer" in refused.json()["error"]["message"]

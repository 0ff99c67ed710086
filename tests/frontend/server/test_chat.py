"""POST /v1/chat/completions: OpenAI's shapes, whole and streamed, and what reaches the engine."""

from __future__ import annotations

import pytest

from ringlm.frontend.answer import Choice, Piece, ToolCall, ToolCallDelta
from ringlm.frontend.server.chat_schema import ChatChoice, Delta
from ringlm.frontend.server.responses import encoded
from ringlm.frontend.tokenizer import Tokenizer
from tests.frontend.fake import EOS, FakeEngine
from tests.frontend.server.conftest import ANSWER, HI, Served

CHAT = "/v1/chat/completions"


def test_a_whole_answer(served: Served, engine: FakeEngine, tokenizer: Tokenizer) -> None:
    answer = served.post(CHAT, model="alias/x", messages=HI)
    assert answer["id"].startswith("chatcmpl-")
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "fake"
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": ANSWER, "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    prompt, count = tokenizer.chat(HI), len(tokenizer.encode(ANSWER)) + 1
    assert answer["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": count,
        "total_tokens": len(prompt) + count,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert engine.submitted[1][0] == prompt
    assert engine.submitted[1][1].max_tokens == engine.ready.context


def test_a_stream(served: Served) -> None:
    events = served.events(CHAT, messages=HI)
    assert all(event["object"] == "chat.completion.chunk" for event in events)
    assert len({(event["id"], event["created"], event["model"]) for event in events}) == 1
    assert not any("usage" in event for event in events)
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta["content"] for delta in deltas[:-1]) == ANSWER
    assert deltas[-1] == {}
    reasons = [event["choices"][0]["finish_reason"] for event in events]
    assert reasons == [None] * (len(events) - 1) + ["stop"]


def test_usage_in_a_stream(served: Served) -> None:
    events = served.events(CHAT, messages=HI, stream_options={"include_usage": True})
    assert all(event["usage"] is None for event in events[:-1])
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == served.post(CHAT, messages=HI)["usage"]


def test_several_answers(served: Served, engine: FakeEngine) -> None:
    answer = served.post(CHAT, messages=HI, n=3, seed=7)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert [params.seed for _, params in engine.submitted.values()] == [7, 8, 9]
    events = served.events(CHAT, messages=HI, n=2)
    for index in (0, 1):
        of_one = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        assert of_one[0]["delta"]["role"] == "assistant"
        assert "".join(each["delta"].get("content", "") for each in of_one) == ANSWER
        assert of_one[-1]["finish_reason"] == "stop"


def test_logprobs(served: Served, tokenizer: Tokenizer) -> None:
    (choice,) = served.post(CHAT, messages=HI, logprobs=True, top_logprobs=2)["choices"]
    tokens = [*tokenizer.encode(ANSWER), EOS]
    shown = choice["logprobs"]["content"]
    assert [each["logprob"] for each in shown] == [-token / 100 for token in tokens]
    assert bytes(byte for each in shown[:-1] for byte in each["bytes"]).decode() == ANSWER
    assert [len(each["top_logprobs"]) for each in shown] == [2] * len(tokens)
    assert set(shown[0]["top_logprobs"][0]) == {"token", "logprob", "bytes"}
    streamed = served.events(CHAT, messages=HI, logprobs=True)
    parts = [event["choices"][0]["logprobs"] for event in streamed]
    told = [each for part in parts if part is not None for each in part["content"]]
    assert told == [each | {"top_logprobs": []} for each in shown]


def test_every_parameter_reaches_the_engine(served: Served, engine: FakeEngine) -> None:
    fields = {
        "temperature": 0.5,
        "top_k": 5,
        "top_p": 0.9,
        "min_p": 0.1,
        "typical_p": 0.8,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "seed": 3,
        "min_tokens": 2,
        "ignore_eos": True,
    }
    served.post(
        CHAT,
        messages=HI,
        **fields,
        max_tokens=9,
        max_completion_tokens=4,
        logit_bias={"17": 2.5},
        stop_token_ids=[11],
        bad_words=["word"],
        user="somebody",
        n=None,
        top_logprobs=None,
    )
    params = engine.submitted[1][1]
    assert {name: getattr(params, name) for name in fields} == fields
    assert params.max_tokens == 4
    assert params.logit_bias == {17: 2.5}
    assert 11 in params.stop_token_ids
    assert params.bad_token_ids


@pytest.mark.parametrize("stop", [", n", ["nothing", ", n"]])
def test_stop_strings(served: Served, stop: object) -> None:
    (choice,) = served.post(CHAT, messages=HI, stop=stop)["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Paris", "stop")


def test_roles_and_variables(served: Served, engine: FakeEngine, tokenizer: Tokenizer) -> None:
    system = [{"role": "system", "content": "Be brief."}, *HI]
    served.post(
        CHAT, messages=[system[0] | {"role": "developer"}, *HI], chat_template_kwargs={"enable_thinking": False}
    )
    assert engine.submitted[1][0] == tokenizer.chat(system)


def test_unknown_fields_are_ignored_and_told_once(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "ringlm")
    for _ in range(2):
        served.post(CHAT, messages=HI, brand_new=True, metadata={})
    told = [record.getMessage() for record in caplog.records if "ignored" in record.getMessage()]
    assert told == ["the field 'brand_new' of ChatRequest is ignored"]


def test_calls_of_tools() -> None:
    calls = (ToolCall("call_1", "weather", '{"city": "Paris"}'), ToolCall("call_2", "time", "{}"))
    choice = Choice(0, "", (1,), "tool_calls", "Hm.", calls)
    told = json_of(ChatChoice.of(choice, None))
    assert told["message"] == {
        "role": "assistant",
        "content": None,
        "reasoning_content": "Hm.",
        "tool_calls": [
            {"function": {"name": call.name, "arguments": call.arguments}, "id": call.id, "type": "function"}
            for call in calls
        ],
        "refusal": None,
    }
    assert told["finish_reason"] == "tool_calls"
    assert len(json_of(ChatChoice.of(choice, 1))["message"]["tool_calls"]) == 1


def test_calls_of_tools_in_a_stream() -> None:
    first = Piece("", (1,), reasoning="Hm.", tool_calls=(ToolCallDelta(0, "call_1", "weather"),))
    assert json_of(Delta.of(first, None)) == {
        "reasoning_content": "Hm.",
        "tool_calls": [
            {"index": 0, "id": "call_1", "type": "function", "function": {"name": "weather", "arguments": ""}}
        ],
    }
    more = Piece("", (2,), tool_calls=(ToolCallDelta(1, arguments='{"ci'),))
    assert json_of(Delta.of(more, None)) == {"tool_calls": [{"index": 1, "function": {"arguments": '{"ci'}}]}
    assert Delta.of(more, 1) is None
    assert Delta.of(Piece("", (3,), "stop"), None) is None


def json_of(data: object) -> dict[str, object]:
    import json

    return json.loads(bytes(encoded(data).body))  # type: ignore[arg-type]

"""/v1/messages by Anthropic's own client: thinking, text and tool use, whole and streamed; errors in its shape."""

from __future__ import annotations

from typing import Any

import anthropic
import pytest

from ringlm.errors import PeerLostError
from ringlm.frontend.tokenizer import Tokenizer
from tests.frontend.fake import EOS, FakeEngine
from tests.frontend.server.conftest import HI, Serve, Served
from tests.frontend.server.test_errors import BusyEngine

PATH = "/v1/messages"
ANSWER = (
    '<think>Rain?</think>Let me look.<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
)
TOOLS: list[Any] = [{"name": "weather", "description": "In a city.", "input_schema": {"type": "object"}}]
ASK: dict[str, Any] = {"model": "fake", "max_tokens": 1000, "messages": HI, "tools": TOOLS}


@pytest.fixture
def engine(able: Tokenizer) -> FakeEngine:
    return FakeEngine(lambda _: [*able.encode(ANSWER), EOS], context=16384)


@pytest.fixture
def served(serve: Serve, engine: FakeEngine, able: Tokenizer) -> Served:
    return serve(engine, speaks=able)


def client_of(served: Served, key: str = "none") -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url="http://testserver", api_key=key, http_client=served.client, max_retries=0)


@pytest.fixture
def client(served: Served) -> anthropic.Anthropic:
    return client_of(served)


def prompt(engine: FakeEngine, able: Tokenizer) -> str:
    text: str = able._backend.decode(list(engine.submitted.values())[-1][0], skip_special_tokens=False)
    return text


def test_a_whole_answer(client: anthropic.Anthropic, engine: FakeEngine, able: Tokenizer) -> None:
    answer = client.messages.create(
        **ASK,
        system="Be brief.",
        thinking={"type": "enabled", "budget_tokens": 1024},
        extra_body={"temperature": 0.5, "top_k": 5, "top_p": 0.9},
    )
    thought, text, *uses = answer.content
    assert (thought.type, text.type) == ("thinking", "text")
    assert (thought.thinking, text.text) == ("Rain?", "Let me look.")  # type: ignore[union-attr]
    assert [(use.type, use.name, use.input) for use in uses] == [  # type: ignore[union-attr]
        ("tool_use", "weather", {"city": city}) for city in ("Paris", "Rome")
    ]
    assert (answer.role, answer.model, answer.stop_reason, answer.stop_sequence) == (
        "assistant",
        "fake",
        "tool_use",
        None,
    )
    assert (answer.usage.input_tokens, answer.usage.cache_read_input_tokens) == (len(engine.submitted[1][0]), 0)
    assert answer.usage.output_tokens == len(able.encode(ANSWER)) + 1
    assert answer._request_id in answer.id
    params = engine.submitted[1][1]
    assert (params.max_tokens, params.temperature, params.top_k, params.top_p) == (1000, 0.5, 5, 0.9)
    assert "<|im_start|>system\nBe brief.<|im_end|>" in prompt(engine, able)


def test_a_stream(served: Served, client: anthropic.Anthropic) -> None:
    whole = client.messages.create(**ASK)
    events = list(client.messages.create(**ASK, stream=True))
    kinds = [(event.type, getattr(event, "index", None)) for event in events]
    told = [kind for kind, before in zip(kinds, [None, *kinds], strict=False) if kind != before]
    blocks = [(f"content_block_{what}", index) for index in range(4) for what in ("start", "delta", "stop")]
    assert told == [("message_start", None), *blocks, ("message_delta", None), ("message_stop", None)]
    with client.messages.stream(**ASK) as stream:
        final = stream.get_final_message()
    assert [_bare(block) for block in final.content] == [_bare(block) for block in whole.content]
    assert (final.stop_reason, final.usage) == (whole.stop_reason, whole.usage)
    text = served.client.post(PATH, json=ASK | {"stream": True}).text
    assert text.count('event: ping\ndata: {"type":"ping"}\n\n') == 1
    assert "[DONE]" not in text


@pytest.mark.parametrize("stream", [False, True])
def test_why_it_stopped(serve: Serve, engine: FakeEngine, stream: bool) -> None:
    client = client_of(serve(engine))

    def ask(**more: Any) -> Any:
        fields = {key: value for key, value in ASK.items() if key != "tools"} | more
        if not stream:
            return client.messages.create(**fields)
        with client.messages.stream(**fields) as events:
            return events.get_final_message()

    assert (ask().stop_reason, ask().stop_sequence) == ("end_turn", None)
    stopped = ask(stop_sequences=["nothing", " look"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", " look")
    assert stopped.content[0].text == "<think>Rain?</think>Let me"
    assert ask(max_tokens=2).stop_reason == "max_tokens"


def test_a_call_that_is_cut_off(client: anthropic.Anthropic, able: Tokenizer) -> None:
    short = len(able.encode(ANSWER[: ANSWER.index("Paris")]))
    answer = client.messages.create(**ASK | {"max_tokens": short})
    assert (answer.stop_reason, answer.content[-1].input) == ("max_tokens", {})  # type: ignore[union-attr]


def test_a_conversation_with_results(client: anthropic.Anthropic, engine: FakeEngine, able: Tokenizer) -> None:
    first = client.messages.create(**ASK)
    ids = [block.id for block in first.content if block.type == "tool_use"]
    results: list[Any] = [
        {"type": "tool_result", "tool_use_id": ids[0], "content": "wet", "cache_control": {"type": "ephemeral"}},
        {"type": "tool_result", "tool_use_id": ids[1], "content": [{"type": "text", "text": "dry"}, {"type": "image"}]},
        {"type": "text", "text": "And now?"},
    ]
    messages = [*HI, {"role": "assistant", "content": first.content}, {"role": "user", "content": results}]
    client.messages.create(**ASK | {"messages": messages, "tool_choice": {"type": "none"}})
    said = [turn.removeprefix("<|im_start|>") for turn in prompt(engine, able).split("<|im_end|>\n")]
    assert said == [
        "user\nHi",
        "assistant\n" + ANSWER.removeprefix("<think>Rain?</think>"),
        "tool\nwet",
        "tool\ndry\n[image: this model cannot see it, it reads texts only]",
        "user\nAnd now?",
        "assistant\n",
    ]


def test_what_an_agent_sends(client: anthropic.Anthropic, engine: FakeEngine, able: Tokenizer) -> None:
    """A large system prompt in blocks, many tools, those of Anthropic's servers, fields from the future."""
    tools = [TOOLS[0] | {"name": f"tool_{index}", "cache_control": {"type": "ephemeral"}} for index in range(30)]
    tools.append({"type": "web_search_20250305", "name": "web_search", "max_uses": 8})

    def ask(billing: str) -> str:
        client.beta.messages.create(
            model="fake",
            max_tokens=20000,
            system=[
                {"type": "text", "text": f"x-anthropic-billing-header: cc_version=2; cch={billing};"},
                {"type": "text", "text": "You are an agent. " * 500, "cache_control": {"type": "ephemeral"}},
                {"type": "text", "text": "Be brief."},
            ],
            messages=[{"role": "user", "content": [{"type": "text", "text": text} for text in ("<reminder>", "Hi")]}],
            tools=tools,
            thinking={"type": "disabled"},
            metadata={"user_id": "somebody"},
            betas=["interleaved-thinking-2025-05-14"],
            extra_body={"context_management": {"edits": []}},
        )
        return prompt(engine, able)

    text = ask("abc")
    assert text == ask("def")  # and so it is found in the prefix cache
    assert '"tool_29"' in text
    assert "web_search" not in text
    assert "You are an agent. \nBe brief.<|im_end|>" in text
    assert "<reminder>\nHi" in text
    assert text.endswith("<think>\n\n</think>\n\n")


def test_one_call_where_several_are_not_wanted(client: anthropic.Anthropic) -> None:
    answer = client.messages.create(**ASK, tool_choice={"type": "auto", "disable_parallel_tool_use": True})
    assert [block.type for block in answer.content] == ["thinking", "text", "tool_use"]


def test_counting(client: anthropic.Anthropic, engine: FakeEngine) -> None:
    fields = {key: value for key, value in ASK.items() if key != "max_tokens"}
    count = client.messages.count_tokens(**fields, system="Be brief.")
    assert engine.submitted == {}
    assert count.input_tokens == client.messages.create(**ASK, system="Be brief.").usage.input_tokens


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "'image'"),
    ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "'tool_result' lacks a field"),
    ({"messages": []}, "messages"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"tool_choice": {"type": "tool"}}, "tool_choice"),
    ({"messages": [{"role": "user", "content": "long " * 17000}]}, "the context holds 16,384"),
]


@pytest.mark.parametrize(("fields", "words"), REFUSED)
def test_refusals(client: anthropic.Anthropic, engine: FakeEngine, fields: dict[str, Any], words: str) -> None:
    for stream in (False, True):
        with pytest.raises(anthropic.BadRequestError) as error:
            client.messages.create(**ASK | fields, stream=stream)
        assert error.value.type == "invalid_request_error"
        assert words in error.value.body["error"]["message"]  # type: ignore[index]
    assert engine.submitted == {}


def test_keys_and_names(serve: Serve, engine: FakeEngine, able: Tokenizer) -> None:
    served = serve(engine, speaks=able, keys=(b"key",))
    assert client_of(served, "key").messages.create(**ASK).content
    with pytest.raises(anthropic.AuthenticationError) as refused:
        client_of(served, "other").messages.create(**ASK)
    assert refused.value.type == "authentication_error"
    with pytest.raises(anthropic.NotFoundError, match="is not served here") as unknown:
        client_of(served, "key").messages.create(**ASK | {"model": "claude"})
    assert unknown.value.type == "not_found_error"
    assert unknown.value.request_id


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue(serve: Serve, able: Tokenizer, stream: bool) -> None:
    with pytest.raises(anthropic.RateLimitError) as error:
        client_of(serve(BusyEngine(lambda _: [5, EOS]), speaks=able)).messages.create(**ASK, stream=stream)
    assert error.value.type == "rate_limit_error"
    assert error.value.response.headers["retry-after"]


def test_a_stream_that_breaks_off(serve: Serve, able: Tokenizer) -> None:
    lost = PeerLostError("rank 1 is lost.", 1)
    client = client_of(serve(FakeEngine(lambda _: able.encode("word " * 99), fail_after=8, failure=lost), speaks=able))
    with pytest.raises(anthropic.APIStatusError, match="rank 1 is lost") as error:
        list(client.messages.create(**ASK, stream=True))
    assert error.value.type == "api_error"


def _bare(block: Any) -> dict[str, Any]:
    return {key: value for key, value in block.to_dict().items() if key != "id"}

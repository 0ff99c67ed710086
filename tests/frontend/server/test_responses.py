"""/v1/responses by OpenAI's own client: reasoning, text and calls, whole and streamed; what is kept."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from ringlm.errors import PeerLostError
from ringlm.frontend.server.responses_store import Kept, ResponseStore
from ringlm.frontend.tokenizer import Tokenizer
from tests.frontend.fake import EOS, FakeEngine
from tests.frontend.server.conftest import Serve, Served

PATH = "/v1/responses"
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
ANSWER = f"<think>Rain?</think>Let me look.{CALL}{CALL}"
TOOLS: list[Any] = [{"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": False}]


@pytest.fixture
def engine(able: Tokenizer) -> FakeEngine:
    return FakeEngine(lambda _: [*able.encode(ANSWER), EOS])


@pytest.fixture
def served(serve: Serve, engine: FakeEngine, able: Tokenizer) -> Served:
    return serve(engine, speaks=able)


def client_of(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url="http://testserver/v1", api_key="none", http_client=served.client, max_retries=0)


@pytest.fixture
def client(served: Served) -> openai.OpenAI:
    return client_of(served)


def prompt(engine: FakeEngine, able: Tokenizer, number: int = -1) -> str:
    text: str = able._backend.decode(list(engine.submitted.values())[number][0], skip_special_tokens=False)
    return text


def test_a_whole_answer(client: openai.OpenAI, engine: FakeEngine, able: Tokenizer) -> None:
    answer = client.responses.create(
        model="fake", instructions="Be brief.", input="Paris?", tools=TOOLS, metadata={"a": "b"}
    )
    thought, message, *calls = answer.output
    assert thought.type == "reasoning"
    assert [part.text for part in thought.content or ()] == ["Rain?"]
    assert (message.type, answer.output_text) == ("message", "Let me look.")
    assert [(call.type, call.name, call.arguments) for call in calls] == [
        ("function_call", "weather", '{"city": "Paris"}')
    ] * 2
    assert len({item.id for item in answer.output} | {call.call_id for call in calls}) == 6
    assert (answer.status, answer.metadata, answer.instructions) == ("completed", {"a": "b"}, "Be brief.")
    assert answer.usage is not None
    assert answer.usage.output_tokens == len(able.encode(ANSWER)) + 1
    assert 0 < answer.usage.output_tokens_details.reasoning_tokens < answer.usage.output_tokens
    assert prompt(engine, able).count("<|im_start|>system\nBe brief.") == 1


def test_a_stream(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "fake", "input": "Paris?", "tools": TOOLS}
    whole = client.responses.create(**asked)
    events = list(client.responses.create(**asked, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds: list[str] = []
    for event in events:
        if kinds[-1:] != [event.type]:
            kinds.append(event.type.removeprefix("response."))
    part = ["output_item.added", "content_part.added", "{}.delta", "{}.done", "content_part.done", "output_item.done"]
    call = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]
    told = [kind for kind, before in zip(kinds, ["", *kinds], strict=False) if kind != before]
    assert told == [
        *("created", "in_progress"),
        *(kind.format("reasoning_text") for kind in part),
        *(kind.format("output_text") for kind in part),
        *call,
        *call,
        "completed",
    ]
    last = events[-1]
    assert last.type == "response.completed"
    assert [_bare(item) for item in last.response.output] == [_bare(item) for item in whole.output]
    assert last.response.usage == whole.usage
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert done == last.response.output
    for index, item in enumerate(done):
        deltas = "".join(getattr(e, "delta", "") for e in events if getattr(e, "output_index", None) == index)
        assert deltas == (item.arguments if item.type == "function_call" else item.content[0].text)  # type: ignore[union-attr,index]


def test_the_clients_helper(client: openai.OpenAI) -> None:
    with client.responses.stream(model="fake", input="Paris?", tools=TOOLS) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_response()
    assert final.output_text == "Let me look."
    assert {"response.output_text.delta", "response.function_call_arguments.delta"} <= kinds


def test_an_answer_that_is_cut_off(client: openai.OpenAI) -> None:
    answer = client.responses.create(model="fake", input="Paris?", max_output_tokens=2)
    assert (answer.status, answer.output[-1].status) == ("incomplete", "incomplete")
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    *_, last = client.responses.create(model="fake", input="Paris?", max_output_tokens=2, stream=True)
    assert last.type == "response.incomplete"


def test_one_call_where_several_are_not_wanted(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "fake", "input": "Paris?", "tools": TOOLS, "parallel_tool_calls": False}
    assert [item.type for item in client.responses.create(**asked).output] == ["reasoning", "message", "function_call"]


def test_a_conversation_by_its_items(client: openai.OpenAI, engine: FakeEngine, able: Tokenizer) -> None:
    """Sent whole or gone on from, it is the same prompt."""
    first = client.responses.create(model="fake", input="Paris?", tools=TOOLS)
    results: list[Any] = [
        {"type": "function_call_output", "call_id": item.call_id, "output": "wet"}
        for item in first.output
        if item.type == "function_call"
    ]
    items: list[Any] = [{"role": "user", "content": [{"type": "input_text", "text": "Paris?"}]}]
    items += [item.to_dict() for item in first.output] + results
    client.responses.create(model="fake", input=items, tools=TOOLS, store=False)
    whole = prompt(engine, able)
    assert whole.count("<|im_start|>assistant") == 2  # reasoning, text and calls are one message
    assert whole.count("<tool_call>\n{") == 2
    assert whole.count("wet") == 2
    second = client.responses.create(model="fake", input=results, tools=TOOLS, previous_response_id=first.id)
    assert prompt(engine, able) == whole
    client.responses.create(model="fake", input="And Rome?", tools=TOOLS, previous_response_id=second.id)
    assert prompt(engine, able).startswith(whole[: whole.rindex("<|im_start|>assistant")])


def test_what_is_kept(client: openai.OpenAI) -> None:
    kept = client.responses.create(model="fake", input="Hi")
    assert client.responses.retrieve(kept.id) == kept
    *_, streamed = client.responses.create(model="fake", input="Hi", stream=True)
    assert client.responses.retrieve(streamed.response.id) == streamed.response  # type: ignore[union-attr]
    client.responses.delete(kept.id)
    loose = client.responses.create(model="fake", input="Hi", store=False)
    for name in (kept.id, loose.id, "resp_none"):
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(name)
        with pytest.raises(openai.NotFoundError):
            client.responses.delete(name)
        with pytest.raises(openai.BadRequestError) as error:
            client.responses.create(model="fake", input="Hi", previous_response_id=name)
        assert error.value.code == "previous_response_not_found"


def test_the_store_forgets() -> None:
    store = ResponseStore(max_bytes=100)
    for name in "abc":
        store.keep(name, Kept(b"x" * 20, b"y" * 10))
    assert store.find("a")  # and so b is the oldest
    store.keep("d", Kept(b"x" * 30, b""))
    assert [name for name in "abcd" if store.find(name)] == ["a", "c", "d"]
    store.keep("large", Kept(b"x" * 101, b""))
    assert not any(store.find(name) for name in ("a", "b", "c", "d", "large"))
    store.keep("e", Kept(b"x" * 100, b""))
    assert store.drop("e")
    assert not store.drop("e")


def test_tools_as_agents_send_them(serve: Serve, able: Tokenizer) -> None:
    """Many, some of them in namespaces, some that OpenAI's servers would run."""
    said = '<tool_call>\n{"name": "mcp__files__read", "arguments": {"path": "a"}}\n</tool_call>'
    engine = FakeEngine(lambda _: [*able.encode(said), EOS], context=16384)
    client = client_of(serve(engine, speaks=able))
    plain: list[Any] = [{"type": "function", "name": f"tool_{i}", "parameters": {"type": "object"}} for i in range(30)]
    inner = {"type": "function", "name": "read", "description": "Read a file."}
    others = [{"type": "web_search"}, {"type": "custom", "name": "apply_patch", "format": {"type": "text"}}]
    tools = [*plain, {"type": "namespace", "name": "mcp__files__", "description": "Files.", "tools": [inner]}, *others]
    answer = client.responses.create(
        model="fake",
        instructions="You are an agent. " * 100,
        input=[{"role": "developer", "content": "Ask first."}, {"role": "user", "content": "Read a."}],
        tools=tools,
        reasoning={"effort": "none", "summary": "auto"},
        include=["reasoning.encrypted_content"],
        extra_body={"client_metadata": {"brand": "new"}, "prompt_cache_key": "x"},
    )
    (call,) = answer.output
    assert call.type == "function_call"
    assert (call.namespace, call.name, call.arguments) == ("mcp__files__", "read", '{"path": "a"}')
    text = prompt(engine, able)
    assert '"tool_29"' in text
    assert '"mcp__files__read"' in text
    assert "web_search" not in text
    assert text.count("<|im_start|>system") == 1
    assert text.endswith("<think>\n\n</think>\n\n")
    history: Any = [{"role": "user", "content": "Read a."}, call.to_dict()]
    history += [
        {"type": "function_call_output", "call_id": call.call_id, "output": [{"type": "input_text", "text": "A"}]}
    ]
    client.responses.create(model="fake", input=history, tools=tools)
    assert '{"name": "mcp__files__read", "arguments"' in prompt(engine, able)
    allowed: Any = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "tool_3"}]}
    client.responses.create(model="fake", input="Hi", tools=tools, tool_choice=allowed)
    assert '"tool_3"' in prompt(engine, able)
    assert '"tool_4"' not in prompt(engine, able)


def test_counting(client: openai.OpenAI, engine: FakeEngine) -> None:
    count = client.responses.input_tokens.count(model="fake", instructions="Be brief.", input="Paris?", tools=TOOLS)
    assert engine.submitted == {}
    answer = client.responses.create(model="fake", instructions="Be brief.", input="Paris?", tools=TOOLS)
    assert answer.usage is not None
    assert count.input_tokens == answer.usage.input_tokens


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"input": []}, "no message"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "'item_reference'"),
    ({"input": [{"type": "function_call", "name": "f"}]}, "lacks a field"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "'input_image'"),
    ({"input": "Hi", "background": True}, "background"),
    ({"input": "Hi", "conversation": "c"}, "conversation"),
    ({"input": "Hi", "tool_choice": {"type": "mcp", "server_label": "x"}}, "tool_choice"),
    ({"input": "Hi", "tools": [{"type": "function"}]}, "needs a name"),
    ({"input": "Hi", "temperature": 101}, "temperature"),
    ({"input": "long " * 3000}, "the context holds 2,048"),
]


@pytest.mark.parametrize(("fields", "words"), REFUSED)
def test_refusals(served: Served, engine: FakeEngine, fields: dict[str, Any], words: str) -> None:
    for stream in (False, True):
        response = served.client.post(PATH, json=fields | {"stream": stream})
        assert response.status_code == 400
        assert words in response.json()["error"]["message"]
    assert engine.submitted == {}


def test_a_stream_that_breaks_off(serve: Serve, able: Tokenizer) -> None:
    lost = PeerLostError("rank 1 is lost.", 1)
    client = client_of(serve(FakeEngine(lambda _: able.encode("word " * 99), fail_after=8, failure=lost), speaks=able))
    *_, last = client.responses.create(model="fake", input="Hi", stream=True)
    assert last.type == "response.failed"
    assert last.response.status == "failed"
    assert last.response.error is not None
    assert last.response.error.message == "rank 1 is lost."


def _bare(item: Any) -> dict[str, Any]:
    return {key: value for key, value in item.to_dict().items() if key not in ("id", "call_id")}

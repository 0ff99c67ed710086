"""Answers of prescribed shapes, by OpenAI's client from a server of two ranks: they validate, whatever the model, at
temperature 1, wanted to say."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import anthropic
import openai
import pydantic
import pytest

from benchmarks.schemas import make, validator
from tests.frontend.server.ring import serving
from tests.frontend.tools import templates

ASK = [{"role": "user", "content": "Tell me about somebody, and be brief."}]
WARM = {"model": "demo", "temperature": 1.0, "seed": 4, "max_tokens": 120}
# For shapes that have an end, beyond whatever white space a model at temperature 1 puts between their parts.
ENOUGH = 600
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "weather", "strict": True, "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "clock"}},
]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    template: Path = tmp_path_factory.mktemp("templates") / "qwen.jinja"
    template.write_text(templates.QWEN)
    options = ("--quant", "int4", "--context", "1024", "--chat-template", str(template), "--served-model-name", "demo")
    with (
        serving(*options) as (_, url),
        openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=90) as made,
    ):
        yield made


class Pet(pydantic.BaseModel):
    kind: Literal["cat", "dog"]
    age: int = pydantic.Field(ge=0, le=30)


class Person(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=20)
    pets: list[Pet] = pydantic.Field(max_length=2)
    partner: Pet | None


def test_the_clients_helper_parses(client: openai.OpenAI) -> None:
    (choice,) = client.chat.completions.parse(
        messages=ASK, response_format=Person, **WARM | {"max_tokens": ENOUGH}
    ).choices
    assert choice.finish_reason == "stop"
    assert isinstance(choice.message.parsed, Person)


def test_random_schemas_validate(client: openai.OpenAI) -> None:
    def ask(seed: int) -> tuple[str, str]:
        format = {"type": "json_schema", "json_schema": {"name": "any", "schema": make(seed), "strict": True}}
        parts, end = [], ""
        for chunk in client.chat.completions.create(messages=ASK, response_format=format, stream=True, **WARM):
            parts.append(chunk.choices[0].delta.content or "")
            end = chunk.choices[0].finish_reason or end
        return "".join(parts), end

    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(ask, range(10)))
    ended = [(seed, text) for seed, (text, end) in enumerate(answers) if end == "stop"]
    assert len(ended) >= 3  # the others were cut at the limit
    for seed, text in ended:
        validator(make(seed)).validate(json.loads(text))


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"guided_regex": r"[a-d]{3}/\d{2}"}, r"[a-d]{3}/\d{2}"),
        ({"guided_choice": ["yes", "no/never"]}, "yes|no/never"),
        ({"guided_grammar": 'start: "a" NUMBER "z"\nNUMBER: /[0-9]{2}/'}, r"a\d\dz"),
        ({"structured_outputs": {"json": {"enum": [3, 5]}}}, "3|5"),
    ],
)
def test_other_shapes(client: openai.OpenAI, fields: dict[str, Any], pattern: str) -> None:
    answers = client.completions.create(prompt="So it is:", n=3, extra_body=fields, **WARM).choices
    assert all(re.fullmatch(pattern, answer.text) and answer.finish_reason == "stop" for answer in answers)


def test_any_object_and_what_cuts_it(client: openai.OpenAI) -> None:
    format = {"type": "json_object"}
    (choice,) = client.chat.completions.create(messages=ASK, response_format=format, **WARM).choices
    assert (choice.message.content or "").startswith("{")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content or ""), dict)
    asked = {"messages": ASK, "extra_body": {"structured_outputs": {"json": {"const": "abcdefghijklmnopqrstuvwxyz"}}}}
    (choice,) = client.chat.completions.create(**asked, **WARM | {"max_tokens": 1}).choices
    assert choice.finish_reason == "length"
    (choice,) = client.chat.completions.create(**asked, stop=["cde"], **WARM).choices
    assert (choice.message.content, choice.finish_reason) == ('"ab', "stop")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("shape", "why"),
    [
        ({"json": {"properties": {"a": {"items": {"if": {}}}}}}, "at #/properties/a/items/if: 'if' cannot be enforced"),
        ({"json": {"oneOf": [{"type": "string"}, {"maxLength": 3}]}}, "oneOf"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"grammar": "start: nobody"}, "nobody"),
    ],
)
def test_what_cannot_be_enforced_is_refused(
    client: openai.OpenAI, shape: dict[str, Any], why: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError, match=re.escape(why)):
        client.chat.completions.create(messages=ASK, stream=stream, extra_body={"structured_outputs": shape}, **WARM)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_demanded_calls_validate(client: openai.OpenAI, choice: Any) -> None:
    asked = {"messages": ASK, "tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False, "n": 3}
    for answer in client.chat.completions.create(**asked, **WARM | {"max_tokens": ENOUGH}).choices:
        if answer.finish_reason == "length" and choice == "required":  # a clock takes any arguments
            continue
        assert answer.finish_reason == "tool_calls"
        assert answer.message.content is None
        (call,) = answer.message.tool_calls or ()
        arguments = json.loads(call.function.arguments)
        if call.function.name == "weather":
            validator(SCHEMA).validate(arguments)
        else:
            assert choice == "required"
            assert isinstance(arguments, dict)


def test_the_other_apis(client: openai.OpenAI) -> None:
    warm: dict[str, Any] = {"model": "demo", "temperature": 1.0}
    parsed = client.responses.parse(
        input="Tell me about somebody, and be brief.", text_format=Person, max_output_tokens=ENOUGH, **warm
    )
    assert parsed.status == "completed"
    assert isinstance(parsed.output_parsed, Person)
    tools: Any = [{"type": "function", **tool["function"]} for tool in TOOLS]
    named: Any = {"type": "function", "name": "weather"}
    (call,) = client.responses.create(
        input="Hi", tools=tools, tool_choice=named, parallel_tool_calls=False, **warm
    ).output
    assert call.type == "function_call"
    validator(SCHEMA).validate(json.loads(call.arguments))
    url = str(client.base_url).removesuffix("/v1/")
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, timeout=90) as other:
        asked: dict[str, Any] = {"model": "demo", "max_tokens": ENOUGH, "messages": [{"role": "user", "content": "Hi"}]}
        choice: Any = {"type": "any", "disable_parallel_tool_use": True}
        tool: Any = {"name": "weather", "input_schema": SCHEMA}
        with other.messages.stream(**asked, tools=[tool], tool_choice=choice) as stream:
            message = stream.get_final_message()
        assert message.stop_reason == "tool_use"
        (use,) = message.content
        assert use.type == "tool_use"
        validator(SCHEMA).validate(use.input)
        form: Any = {"format": {"type": "json_schema", "schema": SCHEMA}}
        (text,) = other.messages.create(**asked, output_config=form).content
        assert text.type == "text"
        validator(SCHEMA).validate(json.loads(text.text))

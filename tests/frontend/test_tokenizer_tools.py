"""Tools and reasoning by a model's own template and tokens: prompts, parsers, special tokens, what is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

from ringlm.errors import RequestError
from ringlm.frontend.answer import ToolCallDelta
from ringlm.frontend.model import Model
from ringlm.frontend.tokenizer import Tokenizer
from ringlm.frontend.tools.formats import ToolFormat, chosen_format
from tests.frontend.tools import templates

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
USER = {"role": "user", "content": "Paris?"}
FUNCTION = {"name": "weather", "arguments": '{"city": "Paris"}'}
CALLED = {"role": "assistant", "content": None, "tool_calls": [{"id": "123456789", "function": FUNCTION}]}
RESULT = {"role": "tool", "tool_call_id": "123456789", "content": "Sunny."}


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "smol"
    tokenizer._fast.save_pretrained(path)
    return path


def opened(
    folder: Path, template: str | dict[str, str], special: Sequence[str] = (), calling: ToolFormat | None = None
) -> Tokenizer:
    found = Tokenizer.open(Model(folder, "plain"), calling=calling)
    assert found is not None
    found._fast.chat_template = template
    found._backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    return found


def text_of(tokenizer: Tokenizer, ids: list[int]) -> str:
    return str(tokenizer._backend.decode(ids, skip_special_tokens=False))


def answered(tokenizer: Tokenizer, answer: str, prompt: list[int], tools: Any) -> tuple[str, str, list[ToolCallDelta]]:
    """What is told of an answer that comes token by token."""
    parser = tokenizer.answer_parser(prompt, tools)
    assert parser is not None
    detokenizer = tokenizer.detokenizer(keep=parser.markers)
    told = [parser.push(detokenizer.push([token])) for token in tokenizer.encode(answer)]
    told += [parser.push(detokenizer.finish()), parser.finish()]
    calls = [delta for news in told for delta in news.tool_calls]
    return "".join(news.text for news in told), "".join(news.reasoning for news in told), calls


def test_a_conversation_with_tools(folder: Path) -> None:
    found = opened(folder, templates.QWEN)
    prompt = text_of(found, found.chat([USER, CALLED, RESULT], TOOLS))
    assert '"name": "weather", "parameters"' in prompt
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>' in prompt
    assert "Sunny." in prompt
    assert "weather" not in text_of(found, found.chat([USER]))


CITY = '{"city":  "Paris", "days": [1, null]}'  # with white space of the model's own
JSON = '{"city": "Paris", "days": [1, null]}'


@pytest.mark.parametrize("given", [CITY, json.loads(CITY)], ids=["as JSON", "as an object"])
@pytest.mark.parametrize(
    ("template", "shown"),
    [
        ("HARMONY", f"<|start|>assistant to=functions.weather<|channel|>commentary json<|message|>{JSON}<|call|>"),
        ("DEEPSEEK_V3", "<｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\nGIVEN\n```<｜tool▁call▁end｜>"),
        ("DEEPSEEK_V31", "<｜tool▁call▁begin｜>weather<｜tool▁sep｜>GIVEN<｜tool▁call▁end｜>"),
        ("GLM", "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n"),
        ("FUNCTOOLS", '{"name": "weather", "arguments": GIVEN}'),
        ("GRANITE", f'<|tool_call|>[{{"name": "weather", "arguments": {JSON}}}]'),
        ("GEMMA", """<|tool_call>call:weather{city:<|"|>Paris<|"|>,days:[1, None]}<tool_call|>"""),
        ("PHI", f'<|tool_call|>[{{"name": "weather", "arguments": {JSON}}}]<|/tool_call|>'),
        ("SMOLLM3", f'<tool_call>\n{{"name": "weather", "arguments": {JSON}}}\n</tool_call>'),
        ("LFM2", "<|tool_call_start|>[weather(city='Paris', days=[1, None])]<|tool_call_end|>"),
        ("QWEN", f'<tool_call>\n{{"name": "weather", "arguments": {JSON}}}\n</tool_call>'),
    ],
)
def test_earlier_calls_in_every_template(folder: Path, template: str, shown: str, given: Any) -> None:
    """Where a template makes text of the arguments, it gets what the model wrote; else the object. Where it knows no
    calls, they are a part of the text."""
    found = opened(folder, getattr(templates, template))
    call = {"id": "123456789", "function": FUNCTION | {"arguments": given}}
    result = RESULT | {"content": f"Sunny. {json.loads(CITY)}"}  # Python's spelling, by a tool of the user's
    prompt = text_of(found, found.chat([USER, CALLED | {"tool_calls": [call]}, result], TOOLS))
    assert shown.replace("GIVEN", given if isinstance(given, str) else JSON) in prompt
    assert result["content"] in prompt


def test_earlier_thoughts_of_a_call(folder: Path) -> None:
    found = opened(folder, templates.HARMONY)
    prompt = text_of(found, found.chat([USER, CALLED | {"reasoning_content": "Hm."}, RESULT], TOOLS))
    assert "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant to=functions.weather" in prompt
    beside = found.chat([USER, CALLED | {"reasoning_content": "Hm.", "content": "I look."}, RESULT], TOOLS)
    assert "<|channel|>analysis<|message|>I look.<|end|><|start|>assistant to=functions" in text_of(found, beside)


def test_tools_in_the_system_message(folder: Path) -> None:
    found = opened(folder, templates.PHI)
    assert '<|tool|>[{"name": "weather"' in text_of(found, found.chat([USER], TOOLS))
    prompt = text_of(found, found.chat([{"role": "system", "content": "Be brief."}, USER], TOOLS))
    assert prompt.startswith('<|system|>Be brief.<|tool|>[{"name": "weather"')
    assert prompt.count("<|system|>") == 1


def test_answers_in_messages_with_tools_and_without(folder: Path) -> None:
    special = ["<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>", "<|call|>"]
    found = opened(folder, templates.HARMONY, special)
    answer = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes."
    for tools in ([], TOOLS):
        assert answered(found, answer, found.chat([USER], tools), tools) == ("Yes.", "Hm.", [])
    assert set(found.encode("<|call|>")) <= set(found.eos_token_ids)


def test_a_format_that_is_chosen(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text("call = '<call>{name}{arguments}</call>'\nreasoning = '<plan>{reasoning}</plan>'")
    answer = '<plan>Hm.</plan>So: <call>weather{"city": "Paris"}</call>'
    found = opened(folder, templates.OTHER, calling=chosen_format(str(path)))
    text, thought, calls = answered(found, answer, found.chat([USER], TOOLS), TOOLS)
    assert (text, thought, "".join(delta.arguments for delta in calls)) == ("So:", "Hm.", '{"city": "Paris"}')
    assert answered(found, answer, found.chat([USER]), [])[0] == answer.removeprefix("<plan>Hm.</plan>")


@pytest.mark.parametrize(
    ("template", "special", "answer"),
    [
        (templates.QWEN, [], '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'),
        (templates.QWEN, ["<tool_call>"], '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}'),
        (templates.LLAMA, ["<|python_tag|>"], '<|python_tag|>{"name": "weather", "parameters": {"city": "Paris"}}'),
        (templates.MISTRAL, ["[TOOL_CALLS]", "[ARGS]"], '[TOOL_CALLS]weather[ARGS]{"city": "Paris"}'),
        (
            templates.DEEPSEEK_V3,
            ["<｜tool▁sep｜>", "<｜tool▁call▁begin｜>", "<｜tool▁calls▁begin｜>", "<think>", "</think>"],
            "</think><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
            '{"city": "Paris"}\n```',
        ),
        (
            templates.GEMMA,
            ["<|tool_call>", "<tool_call|>", '<|"|>', "<|channel>", "<channel|>"],
            '<channel|><|tool_call>call:weather{city:<|"|>Paris<|"|>}<tool_call|>',
        ),
    ],
)
def test_an_answer_with_a_call(folder: Path, template: str, special: list[str], answer: str) -> None:
    found = opened(folder, template, special)
    text, reasoning, calls = answered(found, answer, found.chat([USER], TOOLS), TOOLS)
    assert (text, reasoning) == ("", "")
    assert [delta.name for delta in calls if delta.name] == ["weather"]
    assert "".join(delta.arguments for delta in calls) == '{"city": "Paris"}'
    assert len(calls) > 2  # they came bit by bit


def test_special_tokens_are_kept_only_where_a_parser_asks(folder: Path) -> None:
    found = opened(folder, templates.MISTRAL, ["[TOOL_CALLS]", "[ARGS]"])
    ids = found.encode("[TOOL_CALLS]a[ARGS]<|im_end|>")
    assert found.decode(ids) == "a"
    assert found.detokenizer(keep=frozenset({"[TOOL_CALLS]"})).push(ids) == "[TOOL_CALLS]a"
    assert found.decode(ids) == "a"


def test_reasoning_opened_by_the_model_or_by_the_prompt(folder: Path) -> None:
    found = opened(folder, templates.QWEN_THINKING)
    prompt = found.chat([USER])
    assert answered(found, "<think>\nHm.\n</think>\n\nYes.", prompt, []) == ("Yes.", "Hm.", [])
    assert answered(found, "Hm.</think>Yes.", prompt, [])[1] == ""
    assert answered(found, "Yes.", found.chat([USER], enable_thinking=False), []) == ("Yes.", "", [])
    distilled = opened(folder, templates.DISTILLED)
    assert answered(distilled, "Hm.\n</think>\n\nYes.", distilled.chat([USER]), []) == ("Yes.", "Hm.", [])


def test_no_parser_where_all_is_text(folder: Path) -> None:
    found = opened(folder, templates.QWEN)
    assert found.answer_parser(found.chat([USER])) is None


def test_a_template_for_tools_beside_another(folder: Path) -> None:
    found = opened(folder, {"default": templates.PLAIN, "tool_use": templates.QWEN})
    assert "weather" in text_of(found, found.chat([USER], TOOLS))
    assert text_of(found, found.chat([USER])) == "<user>Paris?"
    assert found.answer_parser([1], TOOLS) is not None


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (templates.NO_SYSTEM, r"its chat template knows no tools"),
        (templates.PLAIN, r"its chat template knows no tools; ask without tools"),
        (templates.OTHER, r"how its chat template writes calls of tools is not known here"),
    ],
)
def test_a_model_without_tools(folder: Path, template: str, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        opened(folder, template).chat([USER], TOOLS)


def test_calls_one_by_one_where_the_template_takes_no_more(folder: Path) -> None:
    found = opened(folder, templates.LLAMA)
    calls = [CALLED["tool_calls"][0] | {"id": name} for name in ("a", "b")]
    asked = [USER, CALLED | {"tool_calls": calls}, *(RESULT | {"tool_call_id": name} for name in ("a", "b"))]
    # Or drops those beyond the first.
    harmony = opened(folder, templates.HARMONY)
    assert text_of(harmony, harmony.chat(asked)).count("to=functions.weather") == 2
    prompt = text_of(found, found.chat(asked))
    assert prompt.count('"parameters": {"city": "Paris"}') == prompt.count("Sunny.") == 2
    with pytest.raises(RequestError, match="one call at a time"):  # which is what it says
        opened(folder, "{{ raise_exception('one call at a time') }}").chat(asked)


def test_messages_and_tools_that_are_refused(folder: Path) -> None:
    found = opened(folder, templates.QWEN)
    with pytest.raises(RequestError, match="type 'image_url' cannot be read"):
        found.chat([{"role": "user", "content": [{"type": "image_url"}]}])
    with pytest.raises(RequestError, match=r"tools\[0\] is no function"):
        found.chat([USER], [{"type": "web_search"}])


def test_llama_ends_an_answer_after_a_call_too(folder: Path) -> None:
    found = opened(folder, templates.LLAMA, ["<|eom_id|>"])
    assert set(found.eos_token_ids) == {found._fast.eos_token_id, *found.encode("<|eom_id|>")}

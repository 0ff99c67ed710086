"""Tools and reasoning by a model's own template and tokens: prompts, parsers, special tokens, what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

from ringlm.errors import RequestError
from ringlm.frontend.answer import ToolCallDelta
from ringlm.frontend.model import Model
from ringlm.frontend.tokenizer import Tokenizer
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


def opened(folder: Path, template: str | dict[str, str], special: Sequence[str] = ()) -> Tokenizer:
    found = Tokenizer.open(Model(folder, "plain"))
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


@pytest.mark.parametrize(
    ("template", "special", "answer"),
    [
        (templates.QWEN, [], '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'),
        (templates.QWEN, ["<tool_call>"], '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}'),
        (templates.LLAMA, ["<|python_tag|>"], '<|python_tag|>{"name": "weather", "parameters": {"city": "Paris"}}'),
        (templates.MISTRAL, ["[TOOL_CALLS]", "[ARGS]"], '[TOOL_CALLS]weather[ARGS]{"city": "Paris"}'),
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

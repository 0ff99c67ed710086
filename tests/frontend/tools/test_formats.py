"""What a chat template says about calls of tools and reasoning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringlm.errors import ConfigError
from ringlm.frontend import tools
from ringlm.frontend.tools.formats import Reasoning, ToolFormat, chosen_format, reasoning, tool_format
from ringlm.frontend.tools.layouts import LAYOUTS
from tests.frontend.tools import templates
from tests.frontend.tools.reading import Told, read
from tests.frontend.tools.test_answers import ANSWERS
from tests.frontend.tools.test_parser import FORMATS

THINK, BRACKETS = Reasoning("<think>", "</think>"), Reasoning("[THINK]", "[/THINK]")
RESPONSE = Reasoning("<think>", "</think>", "<response>", "</response>")
PHRASES = Reasoning("Here is my thought process:", "Here is my response:")


@pytest.mark.parametrize(
    ("template", "calling", "marks"),
    [
        ("QWEN", FORMATS["hermes"], None),
        ("QWEN_THINKING", FORMATS["hermes"], THINK),
        ("DISTILLED", None, THINK),
        ("LLAMA", FORMATS["llama"], None),
        ("PYTHONIC", FORMATS["pythonic"], None),
        ("MISTRAL", FORMATS["mistral"], None),
        ("MAGISTRAL", FORMATS["mistral"], BRACKETS),
        ("CODER", FORMATS["qwen_coder"], None),
        ("PLAIN", None, None),
    ],
)
def test_told_by_the_template(template: str, calling: ToolFormat | None, marks: Reasoning | None) -> None:
    text = getattr(templates, template)
    assert tool_format(text) is calling
    assert reasoning(text) == marks


EXCERPTS = [  # of published templates
    ("hermes", r"""within <tool_call></tool_call> XML tags:\n<tool_call>\n{\"name\": <function-name>"""),
    ("llama", """'{"name": "' + call.name + '", ' }}\n    {{- '"parameters": ' }}"""),
    ("llama", """'Respond in the format {"name": function name, "parameters": dictionary}'"""),
    ("llama", "'<|python_tag|>' + call"),
    ("mistral", """'[TOOL_CALLS] [' + (call.function | tojson)"""),
    ("qwen_coder", "'\\n<tool_call>\\n<function=' + tool_call.name + '>\\n' … '<parameter=' + args_name + '>\\n'"),
    ("harmony", '"<|start|>assistant<|channel|>analysis<|message|>" + message.content + "<|end|>"'),
    ("deepseek_v3", "'<｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + name + '\\n' + '```json' + '\\n'"),
    ("deepseek_v31", "'<｜tool▁call▁begin｜>' + name + '<｜tool▁sep｜>' + arguments + '<｜tool▁call▁end｜>'"),
    ("deepseek_v32", '{%- set dsml_token = "｜DSML｜" -%} <{{ dsml_token }}invoke name="$FUNCTION_NAME">'),
    ("glm", "<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>\n<arg_value>{arg-value-1}</arg_value>"),
    ("seed_oss", "{%- set toolcall_begin_token = '<seed:tool_call>' -%} <function=f>\\n<parameter=a>1</parameter>"),
    ("minimax", """{%- set toolcall_begin_token = '<minimax:tool_call>' -%} <invoke name="tool-name-1">"""),
    ("phi", "'<|tool|>' + message['tools'] + '<|/tool|>' + '<|end|>'"),
    ("phi", """respond in this format: <|tool_call|>{"name": "foo", "arguments": {"a": 1}}<|/tool_call|>"""),
    (
        "functools_list",
        """formatted as functools[{"name": [function name], "arguments": [function arguments]}, ...]""",
    ),
    ("granite", "respond only with <|tool_call|> followed by a JSON list of tools used."),
    ("gemma", "'<|tool_call>call:' + function['name'] + '{'"),
    ("function_gemma", "'<start_function_call>call:' + tool_call['name'] + '{'"),
    ("tool_code", "'```tool_code\\n' … tool_call['name'] + '('"),
    ("pythonic", "Example Format: [func_name1(params_name1=params_value1, params_name2=params_value2...)]"),
    ("kimi_k2", "<|tool_call_begin|>{{ formatted_id }}<|tool_call_argument_begin|>{{ arguments }}<|tool_call_end|>"),
    ("command_r7b", "1. Action: write <|START_ACTION|> followed by a list of JSON-formatted tool calls"),
    ("nemotron_nano", """'<TOOLCALL>[{{"name": "tool_name1", "arguments": "tool_args1"}}, '"""),
    ("tool_calls", "respond with <tool_calls></tool_calls> XML tags"),
    ("functionary", '<function=example_function_name>{{"example_name": "example_value"}}</function>'),
    ("olmo3", "respond with a pythonic function call wrapped in <function_calls></function_calls> XML tags."),
    ("xlam", 'make calls in a single JSON array: \n\n[{"name": "tool_call_name", "arguments": {"arg1": "value1"}}]'),
    ("lfm2", "List of tools: <|tool_list_start|>["),
    (None, """Action: [{"tool_name": "f", "parameters": {}}]"""),
]


@pytest.mark.parametrize(("name", "excerpt"), EXCERPTS)
def test_told_by_excerpts(name: str | None, excerpt: str) -> None:
    assert tool_format(excerpt) is (None if name is None else chosen_format(name))


@pytest.mark.parametrize(
    ("excerpt", "marks"),
    [
        ("'<think>' + reasoning_content + '</think>'", THINK),
        ("thoughts between <think></think> and write your response between <response></response>", RESPONSE),
        ("Write your thoughts after 'Here is my thought process:' and write your response after", PHRASES),
        ("'<|channel>thought\\n<channel|>'", Reasoning("<|channel>thought", "<channel|>")),
        ("{%- set think_end_token = '</seed:think>' -%}", Reasoning("<seed:think>", "</seed:think>")),
        ("write <|START_THINKING|> … <|END_THINKING|>", Reasoning("<|START_THINKING|>", "<|END_THINKING|>")),
        ('"<|start|>assistant<|channel|>analysis<|message|>"', None),
    ],
)
def test_reasoning_told_by_excerpts(excerpt: str, marks: Reasoning | None) -> None:
    assert reasoning(excerpt) == marks


def test_every_format_has_a_line_and_recordings() -> None:
    modules = {path.stem for path in Path(tools.__path__[0]).glob("*.py") if "\nFORMAT = " in path.read_text()}
    recorded = {answer.format for answer in ANSWERS} | set(FORMATS)
    assert modules | set(LAYOUTS) == {name for name, _ in EXCERPTS if name} == recorded


def test_a_declared_format(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text(
        """
        call = '<call name="{name}">{arguments}</call>'
        argument = '<arg name="{key}">{value}</arg>'
        calls = '<calls>{calls}</calls>'
        reasoning = '<plan>{reasoning}</plan>'
        """
    )
    calling = chosen_format(str(path))
    written = '<call name="now"></call>\n<call name="write"><arg name="count">7</arg></call>'
    answer = f"<plan>Hm.</plan>So:<calls>{written}</calls>"
    told = Told("So:", (("now", "{}"), ("write", '{"count": 7}')), True, "Hm.")
    assert read(answer, calling, calling.reasoning) == read([answer], calling, calling.reasoning) == told
    path.write_text("call = '{name}: {arguments}'")
    assert read('now: {"a": 1}', chosen_format(str(path)), None) == Told("", (("now", '{"a": 1}'),), True)


WRITTEN = [name for name, _ in EXCERPTS if name and chosen_format(name).write]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text("aé' \"\\\n,:{}[]"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", min_size=1), inner, max_size=3),
)


@given(name=st.sampled_from(WRITTEN), values=VALUES, text=st.text("aé' \"\\\n", max_size=9))
def test_what_is_written_is_read(name: str, values: Any, text: str) -> None:
    calling = chosen_format(name)
    calls = [("now", {}), ("write", {"text": text, "any": None if isinstance(values, str) else values})]
    assert calling.write is not None
    told = read(calling.write(calls), calling, None)
    assert told.called
    assert [(each, json.loads(arguments)) for each, arguments in told.calls] == calls


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read: No such file"),
        ("call =", "docs/tools.md shows how a format is declared"),
        ("calls = '{calls}'", "missing required field `call`"),
        ("call = '<c>{json}</c>'\nend = 'x'", "unknown field `end`"),
        (
            "call = '<c>{arguments}{name}</c>'",
            r"'<c>{arguments}{name}</c>' must have {name} and then {arguments}, or {json}",
        ),
        ("call = '<c>{json}{json}</c>'", "or {json}, each once"),
        ("call = '<c>{id}{name}{arguments}</c>'", "something must stand after {id}"),
        ("call = '<c>{name}{arguments}'\nargument = '<k>{key}</k>{value}</v>'", "must end in something"),
        ("call = '<c>{name}{arguments}</c>'\nargument = '{key}={value}'", "something must stand before {key}"),
        ("call = '{json}'\ncalls = '<c>'", "must have {calls}"),
    ],
)
def test_declarations_that_are_refused(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "own.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as error:
        chosen_format(str(path))
    assert words in str(error.value)
    assert str(error.value).startswith(f"--tool-format {path}: ")


def test_a_format_that_is_not_known() -> None:
    with pytest.raises(ConfigError, match=r"--tool-format yaml: there is no such format; give command_r7b, .* FILE"):
        chosen_format("yaml")

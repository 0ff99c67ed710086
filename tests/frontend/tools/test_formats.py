"""What a chat template says about calls of tools and reasoning."""

from __future__ import annotations

import pytest

from ringlm.frontend.tools import formats, hermes, llama, mistral, pythonic, qwen_coder
from ringlm.frontend.tools.formats import Reasoning, ToolFormat, reasoning, tool_format
from tests.frontend.tools import templates

THINK, BRACKETS = Reasoning("<think>", "</think>"), Reasoning("[THINK]", "[/THINK]")


@pytest.mark.parametrize(
    ("template", "calling", "marks"),
    [
        ("QWEN", hermes.FORMAT, None),
        ("QWEN_THINKING", hermes.FORMAT, THINK),
        ("DISTILLED", None, THINK),
        ("LLAMA", llama.FORMAT, None),
        ("PYTHONIC", pythonic.FORMAT, None),
        ("MISTRAL", mistral.FORMAT, None),
        ("MAGISTRAL", mistral.FORMAT, BRACKETS),
        ("CODER", qwen_coder.FORMAT, None),
        ("PLAIN", None, None),
    ],
)
def test_told_by_the_template(template: str, calling: ToolFormat | None, marks: Reasoning | None) -> None:
    text = getattr(templates, template)
    assert tool_format(text) is calling
    assert reasoning(text) == marks


@pytest.mark.parametrize(
    ("excerpt", "module"),
    [
        (r"""within <tool_call></tool_call> XML tags:\n<tool_call>\n{\"name\": <function-name>""", hermes),
        ("""'{"name": "' + call.name + '", ' }}\n    {{- '"parameters": ' }}""", llama),
        ("""'Respond in the format {"name": function name, "parameters": dictionary}'""", llama),
        ("'<|python_tag|>' + call", llama),
        ("""'[TOOL_CALLS] [' + (call.function | tojson)""", mistral),
        ("""<|tool_call|>[{"name": …}]""", None),
        ("""Action: [{"tool_name": "f", "parameters": {}}]""", None),
        ("<tool_call>{name}\n<arg_key>", None),
    ],
)
def test_told_by_excerpts(excerpt: str, module: object) -> None:
    assert tool_format(excerpt) is (module.FORMAT if module else None)


def test_every_format_is_there() -> None:
    assert set(formats._FORMATS) == {"hermes", "llama", "mistral", "pythonic", "qwen_coder"}

"""Chat templates in the manner of published models' ones, in our own words."""

from __future__ import annotations

_TOOLS = "{% if tools %}You may call these: {% for tool in tools %}{{ tool | tojson }}{% endfor %}\n"

QWEN = (
    _TOOLS
    + """\
Write calls as <tool_call>{"name": …, "arguments": {…}}</tool_call>.
{% endif -%}
{% for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content }}
{%- for call in message.tool_calls or [] %}
<tool_call>
{{ '{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson + '}' }}
</tool_call>
{%- endfor %}<|im_end|>
{% endfor -%}
<|im_start|>assistant
"""
)
QWEN_THINKING = QWEN + "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
DISTILLED = "{% for message in messages %}{{ message.content.split('</think>')[-1] }}{% endfor %}<think>\n"
LLAMA = (
    _TOOLS
    + """\
Write a call as {"name": the function's name, "parameters": its arguments}.
{% endif -%}
{% for message in messages -%}
<|start_header_id|>{{ message.role }}<|end_header_id|>
{%- if 'tool_calls' in message %}
{%- if message.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}
{%- set call = message.tool_calls[0].function %}
{{ '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + '}' }}
{%- else %}{{ message.content | trim }}{% endif %}<|eot_id|>
{%- endfor %}<|start_header_id|>assistant<|end_header_id|>

"""
)
PYTHONIC = "{% if tools %}Write calls as [func_name1(name1=value1, …), func_name2(…)]: {{ tools }}{% endif %}"
MISTRAL = """\
{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif -%}
{% for message in messages -%}
{% if message.tool_calls -%}
{% for call in message.tool_calls %}[TOOL_CALLS]{{ call.function.name }}[ARGS]{{ call.function.arguments | tojson }}
{%- endfor %}
{%- elif message.role == 'tool' %}
{%- if message.tool_call_id | length != 9 %}{{ raise_exception('nine letters and digits') }}{% endif -%}
[TOOL_RESULTS]{{ message.content }}[/TOOL_RESULTS]
{%- else %}[INST]{{ message.content }}[/INST]{% endif %}
{%- endfor %}"""
MAGISTRAL = MISTRAL + "{# [THINK] and [/THINK] #}"
CODER = _TOOLS + "Write <tool_call><function=name><parameter=name>value</parameter></function></tool_call>.{% endif %}"
NO_SYSTEM = """\
{% for message in messages %}
{%- if message.role == 'system' %}{{ raise_exception('no system message') }}{% endif %}{{ message.content }}
{%- endfor %}"""
PLAIN = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
OTHER = _TOOLS + "Write Action: name, Input: {…}.{% endif %}"

# Where earlier calls stand, and their arguments, is what differs: as objects, as JSON put into text, or as both.
HARMONY = """\
<|start|>system<|message|>Valid channels: analysis, commentary, final.<|end|>
{%- if tools %}<|start|>developer<|message|>{% for tool in tools %}type {{ tool.function.name }}{% endfor %}<|end|>
{%- endif %}
{%- for message in messages %}
{%- if message.tool_calls %}
{%- set call = message.tool_calls[0].function %}
{%- if message.thinking and message.content %}{{ raise_exception('not both') }}{% endif %}
{%- set thoughts = message.thinking or message.content %}
{%- if thoughts %}<|start|>assistant<|channel|>analysis<|message|>{{ thoughts }}<|end|>{% endif %}
{{- '<|start|>assistant to=functions.' + call.name + '<|channel|>commentary json<|message|>' }}
{{- call.arguments | tojson + '<|call|>' }}
{%- else %}<|start|>{{ message.role }}<|message|>{{ message.content }}<|end|>{% endif %}
{%- endfor %}<|start|>assistant"""
_DEEPSEEK_HEAD = _TOOLS + "Calls begin with <｜tool▁calls▁begin｜>.{% endif %}"
_DEEPSEEK = """\
{% for message in messages %}{{ message.content }}{% if message.tool_calls %}<｜tool▁calls▁begin｜>
{%- for call in message.tool_calls %}<｜tool▁call▁begin｜>CALL<｜tool▁call▁end｜>{% endfor %}<｜tool▁calls▁end｜>
{%- endif %}{% endfor %}<｜Assistant｜><think>
"""
DEEPSEEK_V3 = _DEEPSEEK_HEAD + _DEEPSEEK.replace(
    "CALL",
    "{{ call.type + '<｜tool▁sep｜>' + call.function.name + '\\n```json\\n' + call.function.arguments + '\\n```' }}",
)
DEEPSEEK_V31 = _DEEPSEEK_HEAD + _DEEPSEEK.replace(
    "CALL", "{{ call.function.name + '<｜tool▁sep｜>' + call.function.arguments }}"
)
GLM = """\
{% if tools %}{{ tools | tojson }}{% endif %}
{%- for message in messages %}{{ message.content }}{% for call in message.tool_calls or [] %}
<tool_call>{{ call.function.name }}
{% for key, value in call.function.arguments.items() %}<arg_key>{{ key }}</arg_key>
<arg_value>{{ value if value is string else value | tojson }}</arg_value>
{% endfor %}</tool_call>{% endfor %}{% endfor %}<|assistant|>"""
PHI = """\
{% for message in messages %}<|{{ message.role }}|>{{ message.content }}
{%- if message.tools %}{{ '<|tool|>' + message.tools + '<|/tool|>' }}{% endif %}<|end|>{% endfor %}<|assistant|>"""
SMOLLM3 = """\
{% if xml_tools %}Write <tool_call>{"name": …}</tool_call>. {{ xml_tools }}{% endif %}
{%- for message in messages %}{{ message.content }}{% endfor %}"""
LFM2 = """\
{% if tools %}<|tool_list_start|>{{ tools | tojson }}<|tool_list_end|>{% endif %}
{%- for message in messages %}{{ message.content }}{% endfor %}"""
FUNCTOOLS = """\
{% if tools %}Write functools[{"name": …}]: {{ tools }}{% endif %}
{%- for message in messages %}{{ message.content }}{% for call in message.tool_calls or [] -%}
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments }}}
{%- endfor %}{% endfor %}"""
GRANITE = """\
{% if tools %}Write <|tool_call|> and a list. {{ tools | tojson }}{% endif %}
{%- for message in messages %}{{ message.content }}{% for call in message.tool_calls or [] -%}
<|tool_call|>{{ [{"name": call.function.name, "arguments": call.function.arguments}] | tojson }}
{%- endfor %}{% endfor %}"""
GEMMA = """\
{% if tools %}<|tool>{{ tools | tojson }}<tool|>{% endif %}
{%- for message in messages %}{{ message.content }}{% for call in message.tool_calls or [] %}
{{- '<|tool_call>call:' + call.function.name + '{' }}
{%- if call.function.arguments is mapping %}{% for key, value in call.function.arguments | dictsort -%}
{{ key }}:{{ '<|"|>' + value + '<|"|>' if value is string else value }}{{ ',' if not loop.last }}
{%- endfor %}{% else %}{{ call.function.arguments }}{% endif %}}<tool_call|>
{%- endfor %}{% endfor %}<|turn>model
<|channel>thought
"""

"""The formats that are declared by patterns alone, by name, and whose they are. Knows no other format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from ringlm.frontend.tools.layout import Layout

LAYOUTS: Final[Mapping[str, Layout]] = {
    # Command R7B.
    "command_r7b": Layout(call="<|START_ACTION|>[{json}]<|END_ACTION|>"),
    # DeepSeek V3 and R1.
    "deepseek_v3": Layout(
        calls="<｜tool▁calls▁begin｜>{calls}<｜tool▁calls▁end｜>",
        call="<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```<｜tool▁call▁end｜>",
    ),
    # DeepSeek V3.1.
    "deepseek_v31": Layout(
        calls="<｜tool▁calls▁begin｜>{calls}<｜tool▁calls▁end｜>",
        call="<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜>",
    ),
    # DeepSeek V3.2.
    "deepseek_v32": Layout(
        calls="<｜DSML｜function_calls>\n{calls}\n</｜DSML｜function_calls>",
        call='<｜DSML｜invoke name="{name}">\n{arguments}\n</｜DSML｜invoke>',
        argument='<｜DSML｜parameter name="{key}" string="{text}">{value}</｜DSML｜parameter>',
    ),
    # Functionary 3.1, and Llama 3.1 by templates that ask for it.
    "functionary": Layout(call="<function={name}>{arguments}</function>"),
    # Phi-4-mini by templates that ask for it.
    "functools_list": Layout(call="functools[{json}]"),
    # GLM 4.5 and 4.6.
    "glm": Layout(
        call="<tool_call>{name}\n{arguments}\n</tool_call>",
        argument="<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>",
    ),
    # Granite 3.
    "granite": Layout(call="<|tool_call|>[{json}]"),
    # Hermes, Qwen 2.5 and 3, SmolLM3, Granite 4.
    "hermes": Layout(call="<tool_call>\n{json}\n</tool_call>"),
    # Kimi K2.
    "kimi_k2": Layout(
        calls="<|tool_calls_section_begin|>{calls}<|tool_calls_section_end|>",
        call="<|tool_call_begin|>functions.{name}:{id}<|tool_call_argument_begin|>{arguments}<|tool_call_end|>",
    ),
    # MiniMax M2.
    "minimax": Layout(
        calls="<minimax:tool_call>\n{calls}\n</minimax:tool_call>",
        call='<invoke name="{name}">\n{arguments}\n</invoke>',
        argument='<parameter name="{key}">{value}</parameter>',
    ),
    # Nemotron Nano 2.
    "nemotron_nano": Layout(call="<TOOLCALL>[{json}]</TOOLCALL>"),
    # Phi-4-mini.
    "phi": Layout(call="<|tool_call|>[{json}]<|/tool_call|>"),
    # Qwen3-Coder and 3.5. Some leave out the <tool_call> at the beginning.
    "qwen_coder": Layout(
        call="<tool_call>\n<function={name}>\n{arguments}\n</function>\n</tool_call>",
        argument="<parameter={key}>\n{value}\n</parameter>",
    ),
    # Seed-OSS.
    "seed_oss": Layout(
        call="<seed:tool_call>\n<function={name}>\n{arguments}\n</function>\n</seed:tool_call>",
        argument="<parameter={key}>{value}</parameter>",
    ),
    # Apriel 1.5 and 1.6, Hunyuan A13B, MiniMax M1.
    "tool_calls": Layout(call="<tool_calls>[{json}]</tool_calls>"),
    # xLAM: a list of calls, which is the whole answer.
    "xlam": Layout(call="[{json}]"),
}

"""Kimi K2."""

from ringlm.frontend.tools.layout import Layout, declared

FORMAT = declared(
    Layout(
        calls="<|tool_calls_section_begin|>{calls}<|tool_calls_section_end|>",
        call="<|tool_call_begin|>functions.{name}:{id}<|tool_call_argument_begin|>{arguments}<|tool_call_end|>",
    )
)

"""Qwen3-Coder and 3.5. Some leave out the <tool_call> at the beginning."""

from ringlm.frontend.tools.layout import Layout, declared

FORMAT = declared(
    Layout(
        call="<tool_call>\n<function={name}>\n{arguments}\n</function>\n</tool_call>",
        argument="<parameter={key}>\n{value}\n</parameter>",
    )
)

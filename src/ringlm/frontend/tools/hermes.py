"""Hermes, Qwen 2.5 and 3, SmolLM3, Granite 4."""

from ringlm.frontend.tools.layout import Layout, declared

FORMAT = declared(Layout(call="<tool_call>\n{json}\n</tool_call>"))

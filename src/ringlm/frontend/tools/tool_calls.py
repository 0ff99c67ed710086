"""Apriel 1.5 and 1.6, Hunyuan A13B, MiniMax M1."""

from ringlm.frontend.tools.layout import Layout, declared

FORMAT = declared(Layout(call="<tool_calls>[{json}]</tool_calls>"))

"""Phi-4-mini."""

from ringlm.frontend.tools.layout import Layout, declared

FORMAT = declared(Layout(call="<|tool_call|>[{json}]<|/tool_call|>"))

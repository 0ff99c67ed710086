"""Granite 3."""

from ringlm.frontend.tools.layout import Layout, declared

FORMAT = declared(Layout(call="<|tool_call|>[{json}]"))

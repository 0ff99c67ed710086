"""Nemotron Nano 2."""

from ringlm.frontend.tools.layout import Layout, declared

FORMAT = declared(Layout(call="<TOOLCALL>[{json}]</TOOLCALL>"))

"""Phi-4-mini by templates that ask for it."""

from ringlm.frontend.tools.layout import Layout, declared

FORMAT = declared(Layout(call="functools[{json}]"))

"""Functionary 3.1, and Llama 3.1 by templates that ask for it."""

from ringlm.frontend.tools.layout import Layout, declared

FORMAT = declared(Layout(call="<function={name}>{arguments}</function>"))

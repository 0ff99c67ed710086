"""Command R7B."""

from ringlm.frontend.tools.layout import Layout, declared

FORMAT = declared(Layout(call="<|START_ACTION|>[{json}]<|END_ACTION|>"))

"""xLAM: a list of calls, which is the whole answer."""

from ringlm.frontend.tools.layout import Layout, declared

FORMAT = declared(Layout(call="[{json}]"))

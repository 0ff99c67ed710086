"""MiniMax M2."""

from ringlm.frontend.tools.layout import Layout, declared

FORMAT = declared(
    Layout(
        calls="<minimax:tool_call>\n{calls}\n</minimax:tool_call>",
        call='<invoke name="{name}">\n{arguments}\n</invoke>',
        argument='<parameter name="{key}">{value}</parameter>',
    )
)

"""GLM 4.5 and 4.6."""

from ringlm.frontend.tools.layout import Layout, declared

FORMAT = declared(
    Layout(
        call="<tool_call>{name}\n{arguments}\n</tool_call>",
        argument="<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>",
    )
)

"""Seed-OSS."""

from ringlm.frontend.tools.layout import Layout, declared

FORMAT = declared(
    Layout(
        call="<seed:tool_call>\n<function={name}>\n{arguments}\n</function>\n</seed:tool_call>",
        argument="<parameter={key}>{value}</parameter>",
    )
)

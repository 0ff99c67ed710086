"""DeepSeek V3.2."""

from ringlm.frontend.tools.layout import Layout, declared

FORMAT = declared(
    Layout(
        calls="<｜DSML｜function_calls>\n{calls}\n</｜DSML｜function_calls>",
        call='<｜DSML｜invoke name="{name}">\n{arguments}\n</｜DSML｜invoke>',
        argument='<｜DSML｜parameter name="{key}" string="{text}">{value}</｜DSML｜parameter>',
    )
)

"""DeepSeek V3.1."""

from ringlm.frontend.tools.layout import Layout, declared

FORMAT = declared(
    Layout(
        calls="<｜tool▁calls▁begin｜>{calls}<｜tool▁calls▁end｜>",
        call="<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜>",
    )
)

"""DeepSeek V3 and R1."""

from ringlm.frontend.tools.layout import Layout, declared

FORMAT = declared(
    Layout(
        calls="<｜tool▁calls▁begin｜>{calls}<｜tool▁calls▁end｜>",
        call="<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```<｜tool▁call▁end｜>",
    )
)

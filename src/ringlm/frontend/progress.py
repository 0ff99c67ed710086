"""Progress while a ring forms and loads: a bar on a terminal, a line in a pipe where there is need. Knows stages."""

from __future__ import annotations

from rich.progress import BarColumn, DownloadColumn, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.progress import Progress as Bars
from rich.text import Text

from ringlm.cluster.messages import Progress
from ringlm.frontend import console

_STAGES = {"connect": "connecting", "load": "loading"}


class StartUp:
    """A context manager; `show` takes the engine's news while it lasts, and nothing stays on the screen.

    In a pipe only what one waits for is said, such as a rank that has not come, and once.
    """

    def __init__(self) -> None:
        stderr = console.stderr()
        self._told: set[str] = set()
        self._bars: Bars | None = None
        if stderr.is_terminal:
            columns = (_Known(BarColumn()), _Known(DownloadColumn()))
            self._bars = Bars(
                SpinnerColumn(), TextColumn("{task.description}"), *columns, console=stderr, transient=True
            )
            self._task = self._bars.add_task("starting", total=None)

    def show(self, progress: Progress) -> None:
        if self._bars is not None:
            self._bars.update(
                self._task,
                description=_STAGES.get(progress.stage, progress.stage),
                completed=progress.done,
                total=progress.total or None,
            )
        elif progress.stage not in _STAGES and progress.stage not in self._told:
            self._told.add(progress.stage)
            console.notice(progress.stage)

    def __enter__(self) -> StartUp:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bars is not None:
            self._bars.stop()


class _Known(ProgressColumn):
    """A column that shows nothing while the total is unknown."""

    def __init__(self, column: ProgressColumn) -> None:
        super().__init__()
        self._column = column

    def render(self, task: Task) -> Text:
        return Text() if task.total is None else self._column.render(task)  # type: ignore[return-value]

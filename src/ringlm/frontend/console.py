"""What the command line shows: answers, notes, errors. Knows terminals and pipes, no models.

Answers go to stdout and everything else to stderr. Colour and escaped control characters are for
terminals only; NO_COLOR is honoured.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from ringlm import logs
from ringlm.frontend.answer import Completion, Piece

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

log = logging.getLogger("ringlm")

# C0 controls, DEL and C1 would let a model's words command the terminal: shown as symbols instead.
_CONTROLS = (
    {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\t\n\r"}
    | {0x0D: None, 0x7F: "\u2421"}
    | dict.fromkeys(range(0x80, 0xA0), "\ufffd")
)


def escape(text: str) -> str:
    """`text` without characters that a terminal would act upon; carriage returns are dropped."""
    return text.translate(_CONTROLS)


def write(text: str) -> None:
    """A part of an answer to stdout, at once."""
    sys.stdout.write(escape(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def answer(pieces: Iterable[Piece]) -> None:
    """An answer to stdout as it comes; on a terminal its reasoning before it, dimmed."""
    for piece in pieces:
        if piece.reasoning and sys.stdout.isatty():
            _console(on_stderr=False).print(escape(piece.reasoning), style="dim", end="")
        write(piece.text)


def note(text: str) -> None:
    """A line to the user, beside the answer."""
    sys.stdout.flush()
    stderr().print(escape(text), style="dim")


def notice(text: str) -> None:
    """A line about what goes on, where nobody may be looking."""
    if logs.as_json():
        log.warning(text)
    else:
        note(f"ringlm: {text}")


def fail(kind: str, message: str) -> None:
    """The one line of an error."""
    if logs.as_json():
        log.error("%s%s", f"{kind}: " if kind else "", message)
        return
    name = f"ringlm: {kind}: " if kind else "ringlm: "
    sys.stdout.flush()
    console = stderr()
    console.print(name, style="bold red", end="")
    console.print(escape(" ".join(message.split())))


def figures(completion: Completion, world_size: int, on_stderr: bool = False) -> None:
    """A line of tokens per second in and out, and the share of time in the ring; after the answer."""
    sys.stdout.flush()
    _console(on_stderr).print(
        f"prompt {completion.prompt_tokens} tokens, {completion.prompt_tokens_per_s:.1f} tok/s · "
        f"answer {completion.completion_tokens} tokens, {completion.tokens_per_s:.1f} tok/s · "
        f"ring {completion.ring_share:.0%} of the time, world size {world_size}",
        style="dim",
    )


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout: drawn on a terminal, columns of text in a pipe. The first column is left-aligned."""
    shown = stdout()
    shown.print(drawn_table(title, columns, rows, framed=shown.is_terminal))


def drawn_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], framed: bool) -> Table:
    """The same as something that rich draws."""
    from rich import box
    from rich.table import Table

    frame = box.SIMPLE_HEAD if framed else None
    drawn = Table(title=escape(title) or None, box=frame, title_justify="left", title_style="bold" if framed else "")
    for index, column in enumerate(columns):
        drawn.add_column(column, justify="right" if index else "left")
    for row in rows:
        drawn.add_row(*map(escape, row))
    return drawn


@contextlib.contextmanager
def progress(what: str, steps: int) -> Iterator[Callable[[], None]]:
    """A bar on a terminal, nothing in a pipe; yields what is to be called after each of `steps`."""
    from rich.progress import Progress

    console = stderr()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task(what, total=steps)
        yield lambda: bars.advance(task)


def stdout() -> Console:
    """The same for answers; in a pipe lines are as long as they are."""
    shown = _console(on_stderr=False)
    if not shown.is_terminal:
        shown.width = 1 << 16
    return shown


def stderr() -> Console:
    """Rich's console, without its own ideas about markup and line ends."""
    return _console(on_stderr=True)


def _console(on_stderr: bool) -> Console:
    from rich.console import Console

    return Console(stderr=on_stderr, highlight=False, markup=False, emoji=False, soft_wrap=True)

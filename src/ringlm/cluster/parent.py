"""Ending with the process that started this one, also where that was killed: no orphan is left.

A launcher hands its children the reading end of a pipe that it never writes to; the end of that file
means that the launcher is gone.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

VARIABLE = "RINGLM_PARENT_FD"


def watch_parent(on_end: Callable[[], None]) -> None:
    """Call `on_end`, on a thread, once the launcher that started this process is gone. Without one, nothing."""
    fd = os.environ.get(VARIABLE)
    if not fd:
        return

    def wait() -> None:
        while os.read(int(fd), 1):
            pass  # a launcher writes nothing
        on_end()

    threading.Thread(target=wait, name="ringlm-parent", daemon=True).start()

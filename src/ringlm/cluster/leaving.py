"""SIGTERM at an engine process: it leaves once its ring has nothing under way.

Whoever ends a job's processes tells all of them at the same moment, and rank 0 may have answers to finish, which it can
only with the others. Knows no ring.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

PATIENCE_S = 30.0  # a server's own, by default
IDLE_S = 1.0
_LOOK_S = 0.05


def leave_when_idle(work: Callable[[], tuple[int, bool] | None]) -> None:
    """From now on SIGTERM raises SystemExit in the main thread once there has been no work for IDLE_S, or PATIENCE_S
    later; at once where `work` is None, or at a second SIGTERM. Else it is a counter that grows with work, and whether
    some is being done now."""
    asked = threading.Event()

    def await_idle() -> None:
        began = since = time.monotonic()
        seen = work()
        while (now := time.monotonic()) < min(since + IDLE_S, began + PATIENCE_S):
            time.sleep(_LOOK_S)
            done = work()
            if done != seen or (done is not None and done[1]):
                seen, since = done, now
        os.kill(os.getpid(), signal.SIGTERM)

    def terminate(signum: int, frame: FrameType | None) -> None:
        if asked.is_set() or work() is None:
            raise SystemExit(128 + signum)
        asked.set()
        threading.Thread(target=await_idle, name="ringlm-leaving", daemon=True).start()

    signal.signal(signal.SIGTERM, terminate)

"""Collectives in the background: one thread that makes them in the order in which they were submitted.

What it does not know: what a collective is.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from ringlm.ring.devices import streams_of_caller

_T = TypeVar("_T")


class Handle(Generic[_T]):
    """A collective under way. Its tensors are the ring's until it is done."""

    def __init__(self, work: Callable[[], _T]) -> None:
        self._work: Callable[[], _T] | None = work
        self._streams = streams_of_caller()
        self._done = threading.Event()
        self._result: _T | None = None
        self._error: BaseException | None = None

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._done.is_set()

    def wait(self, timeout_s: float | None = None) -> _T:
        """What the collective returns, once it is done; raises what it raised.

        Raises TimeoutError if that takes longer than `timeout_s`, and the collective goes on.
        """
        if not self._done.wait(timeout_s):
            raise TimeoutError(f"the collective is not done after {timeout_s:g} s.")
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]

    def run(self) -> None:
        """Make it, on the streams of who submitted it."""
        assert self._work is not None
        try:
            with contextlib.ExitStack() as stack:
                for stream in self._streams:
                    stack.enter_context(stream)
                self._result = self._work()
        except BaseException as error:  # noqa: BLE001  it is raised where it is waited for
            self._error = error
        self._work = None  # it holds tensors
        self._done.set()


class Background:
    """The thread and its queue."""

    def __init__(self) -> None:
        self._queue: deque[Handle[object]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="ringlm-collectives", daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], _T]) -> Handle[_T]:
        """Queue a collective."""
        handle = Handle(work)
        with self._changed:
            self._queue.append(handle)  # type: ignore[arg-type]
            self._changed.notify_all()
        return handle

    def drain(self) -> None:
        """Return once nothing is queued or under way; at once on its own thread."""
        if threading.current_thread() is self._thread:
            return
        with self._changed:
            self._changed.wait_for(lambda: not self._queue)

    def close(self) -> None:
        """Make what is queued, which fails at once on a ring that has ended, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join(5.0)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if not self._queue:
                    return
                handle = self._queue[0]
            handle.run()
            with self._changed:
                self._queue.popleft()
                self._changed.notify_all()
            del handle

"""Work in the background, in order, and whose turn it is on the links.

One thread makes the collectives in the order in which they were submitted; whoever waits for one meanwhile makes
them itself, which saves two threads' handing over. With nothing queued the thread takes letters that are awaited.
What it does not know: what a collective is, what a letter.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, NoReturn, TypeVar

from ringlm.ring.devices import follow, mark_streams, streams_of_caller

_GRACE_S = 1e-4  # who submits one often waits for it at once, and then makes it without handing over

_T = TypeVar("_T")


class Handle(Generic[_T]):
    """Something under way. Its tensors are the ring's until it is done."""

    def __init__(self, help: Callable[[Handle[_T]], None] | None = None) -> None:
        """`help` may bring it to its end on the thread of who waits for it."""
        self._help = help
        self._streams = streams_of_caller()
        self._marks: list[Any] = []  # on those, where the result's copies are under way
        self._changed = threading.Condition()
        self._done = False
        self._result: _T | None = None
        self._error: BaseException | None = None
        self._callbacks: list[Callable[[], None]] = []

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._done

    def error(self) -> BaseException | None:
        """What `wait` would raise, once it is done."""
        return self._error

    def wait(self, timeout_s: float | None = None) -> _T:
        """What came of it, once it is done, for this thread's current streams; raises what it raised.

        Raises TimeoutError if that takes longer than `timeout_s`, and it goes on.
        """
        if not self._done and timeout_s is None and self._help is not None:
            self._help(self)
        if not self._done:
            with self._changed:
                if not self._changed.wait_for(self.done, timeout_s):
                    raise TimeoutError(f"the collective is not done after {timeout_s:g} s.")
        if self._error is not None:
            raise self._error
        follow(self._marks)
        return self._result  # type: ignore[return-value]

    def then(self, callback: Callable[[], None]) -> None:
        """Call this once it is done, on the thread and the streams on which it ended; at once if it has."""
        with self._changed:
            if not self._done:
                self._callbacks.append(callback)
                return
        callback()

    def finish(self, work: Callable[[], _T]) -> None:
        """End it with what `work` returns or raises, on the streams of who began it. Only the first end counts."""
        with contextlib.ExitStack() as stack:
            for stream in self._streams:
                stack.enter_context(stream)
            result, error, marks = None, None, []
            try:
                result = work()
                marks = mark_streams()
            except BaseException as met:  # noqa: BLE001  it is raised where it is waited for
                error = met
            with self._changed:
                if self._done:
                    return
                self._result, self._error, self._marks, self._done = result, error, marks, True
                callbacks, self._callbacks = self._callbacks, []
                self._changed.notify_all()
            for callback in callbacks:
                callback()

    def fail(self, error: BaseException | None) -> None:
        """End it with `error`."""

        def work() -> NoReturn:
            assert error is not None
            raise error

        self.finish(work)


class Background:
    """The thread, its queue, and the turn: as a context it is its caller's turn, after all that is queued.

    `attend` takes letters until something has come to a socket, which it reads, or none is `awaited` any more.
    """

    def __init__(self, attend: Callable[[socket.socket], None], awaited: Callable[[], bool]) -> None:
        self._attend = attend
        self._awaited = awaited
        self._queue: deque[tuple[Handle[object], Callable[[], object]]] = deque()
        self._turn = threading.RLock()
        self._depth = 0  # how often the thread whose turn it is has taken it
        self._changed = threading.Condition()
        self._callers = 0  # those that wait for a turn
        self._attending = False
        self._closed = False
        self._wake, self._woken = socket.socketpair()
        self._woken.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="ringlm-collectives", daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], _T]) -> Handle[_T]:
        """Queue a collective."""
        handle: Handle[_T] = Handle(self._help)
        with self._changed:
            self._queue.append((handle, work))  # type: ignore[arg-type]
        self.look()
        return handle

    def look(self) -> None:
        """There is something to do, perhaps."""
        with self._changed:
            self._changed.notify_all()
        if self._attending:
            self._wake.send(b"x")

    def __enter__(self) -> Background:
        if not self._turn.acquire(blocking=False):
            with self._changed:
                self._callers += 1
            if self._attending:
                self._wake.send(b"x")
            self._turn.acquire()
            with self._changed:
                self._callers -= 1
                self._changed.notify_all()
        self._depth += 1
        if self._depth == 1:
            while self._queue:
                self._first()
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        self._turn.release()

    def close(self) -> None:
        """Make what is queued, which fails at once on a ring that has ended, and end the thread. Idempotent."""
        self._closed = True
        self.look()
        if threading.current_thread() is not self._thread:
            self._thread.join(5.0)
        if not self._thread.is_alive():
            self._wake.close()
            self._woken.close()

    def _first(self) -> None:
        handle, work = self._queue.popleft()
        handle.finish(work)

    def _help(self, handle: Handle[_T]) -> None:
        """Make what is queued up to `handle` here, unless somebody is at it."""
        if not self._turn.acquire(blocking=False):
            return
        self._depth += 1
        try:
            while self._depth == 1 and self._queue and not handle.done():
                self._first()
        finally:
            self.__exit__()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or (not self._callers and (self._queue or self._awaited())))
                if self._closed and not self._queue:
                    return
            if self._queue:
                time.sleep(_GRACE_S)
            with self._turn:
                self._depth = 1
                if self._queue:
                    self._first()
                else:
                    self._attending = True
                    if not (self._queue or self._callers or self._closed):  # since then whoever comes sends a byte
                        self._attend(self._woken)
                    self._attending = False
                self._depth = 0

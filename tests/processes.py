"""Processes that do as they are told, one call each at a time; a test can stop and kill them. All with deadlines.

They are forks of one server, in which `tests.forked` has run: they start in milliseconds.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
from typing_extensions import Self

DEADLINE_S = 90.0  # for anything at all; who needs longer hangs, also on a machine that is slow or has other work
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["tests.forked"])


class Failure(NamedTuple):
    """An exception that a process met."""

    kind: str
    rank: int | None
    text: str
    trace: str


class Processes:
    """One for each of `contexts`, which it enters. A call is a function of tests, of what its context gave and more."""

    def __init__(self, contexts: list[Callable[[], AbstractContextManager[Any]]]) -> None:
        self._pipes: list[Connection] = []
        self.processes = []
        for context in contexts:
            ours, theirs = _FORKS.Pipe()
            process = _FORKS.Process(target=_obey, args=(context, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self.processes.append(process)
        for rank in range(len(contexts)):
            assert self.result(rank) == "ready"

    def start(self, rank: int, function: Callable[..., Any], *arguments: Any) -> None:
        self._pipes[rank].send((function, arguments))

    def result(self, rank: int, deadline_s: float = DEADLINE_S) -> Any:
        """What the last call on `rank` returned; of an exception a Failure."""
        if not self._pipes[rank].poll(deadline_s):
            raise TimeoutError(f"rank {rank} still runs")
        return self._pipes[rank].recv()

    def call(self, function: Callable[..., Any], *arguments: Any, deadline_s: float = DEADLINE_S) -> list[Any]:
        """`function(here, *arguments)` in every process; the results by rank. None may be a Failure."""
        for rank in range(len(self._pipes)):
            self.start(rank, function, *arguments)
        found = [self.result(rank, deadline_s) for rank in range(len(self._pipes))]
        for outcome in found:
            assert not isinstance(outcome, Failure), outcome.trace
        return found

    def signal(self, rank: int, number: int) -> None:
        os.kill(self.processes[rank].pid, number)

    def close(self) -> None:
        for process, pipe in zip(self.processes, self._pipes, strict=True):
            pipe.close()
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGCONT)
        for process in self.processes:
            process.join(5.0)
            process.kill()
            process.join(5.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _obey(context: Callable[[], AbstractContextManager[Any]], pipe: Connection) -> None:
    torch.set_num_threads(1)
    with context() as here:
        pipe.send("ready")
        while True:
            try:
                function, arguments = pipe.recv()
            except (EOFError, ConnectionResetError):
                return
            try:
                outcome = function(here, *arguments)
            except Exception as error:  # noqa: BLE001  the test judges it
                rank = getattr(error, "rank", None)
                outcome = Failure(type(error).__name__, rank, str(error), traceback.format_exc())
            pipe.send(outcome)

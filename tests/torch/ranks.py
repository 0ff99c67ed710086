"""Processes of a torch.distributed group over the ring, with gloo's beside it, that do as they are told."""

from __future__ import annotations

import datetime
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from tests.ring.helpers import _FORKS, Failure

DEADLINE_S = 90.0


class Here(NamedTuple):
    """What a call gets: this rank, and gloo's group of the same ranks, if one was asked for."""

    rank: int
    world_size: int
    gloo: Any


class Ranks:
    """`world_size` processes whose default group is the ring's, at `store`; without one they have none yet. A call is a
    function of tests, of Here and more."""

    def __init__(
        self, world_size: int, store: Path | None, *, gloo: bool = True, timeout_s: float = DEADLINE_S
    ) -> None:
        self._pipes = []
        self.processes = []
        for rank in range(world_size):
            ours, theirs = _FORKS.Pipe()
            process = _FORKS.Process(target=_rank, args=(rank, world_size, store, gloo, timeout_s, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self.processes.append(process)
        for rank in range(world_size):
            assert self.result(rank) == "ready"

    def start(self, rank: int, function: Callable[..., Any], *arguments: Any) -> None:
        self._pipes[rank].send((function, arguments))

    def result(self, rank: int) -> Any:
        """What the last call on `rank` returned; of an exception a Failure."""
        if not self._pipes[rank].poll(DEADLINE_S):
            raise TimeoutError(f"rank {rank} still runs")
        return self._pipes[rank].recv()

    def call(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """`function(here, *arguments)` on every rank; the results by rank. None may be a Failure."""
        for rank in range(len(self._pipes)):
            self.start(rank, function, *arguments)
        found = [self.result(rank) for rank in range(len(self._pipes))]
        for outcome in found:
            assert not isinstance(outcome, Failure), outcome.text
        return found

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self.processes:
            process.join(5.0)
            process.kill()
            process.join(5.0)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _rank(rank: int, world_size: int, store: Path | None, gloo: bool, timeout_s: float, pipe: Any) -> None:
    torch.set_num_threads(1)
    os.environ.pop("RING_SECRET", None)
    theirs = None
    if store is not None:
        limit = datetime.timedelta(seconds=timeout_s)
        dist.init_process_group("ring", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=limit)
        theirs = dist.new_group(backend="gloo") if gloo else None
    here = Here(rank, world_size, theirs)
    pipe.send("ready")
    while True:
        try:
            function, arguments = pipe.recv()
        except (EOFError, ConnectionResetError):
            return
        try:
            outcome = function(here, *arguments)
        except Exception as error:  # noqa: BLE001  the test judges it
            outcome = Failure(type(error).__name__, getattr(error, "rank", None), traceback.format_exc(), 0.0)
        pipe.send(outcome)

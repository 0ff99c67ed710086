"""Ranks as threads: communicators over a barrier and a shared list, and a runner with a deadline."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from ringlm.parallel.communicator import Communicator

T = TypeVar("T")


class LocalGroup:
    """`world_size` communicators for the threads of one process, as `.ranks`.

    Sums run in rank order in float32 (float64 stays) and round once, on every rank alike.
    """

    def __init__(self, world_size: int, timeout_s: float = 60.0) -> None:
        self.barrier = threading.Barrier(world_size, timeout=timeout_s)
        self.board: list[Any] = [None] * world_size
        self.ranks = [LocalRank(self, rank, world_size) for rank in range(world_size)]

    def abort(self) -> None:
        """Wake every rank that waits in a collective; it raises BrokenBarrierError."""
        self.barrier.abort()


class LocalRank:
    """One rank of a `LocalGroup`. `.calls` counts collectives by name."""

    def __init__(self, group: LocalGroup, rank: int, world_size: int) -> None:
        self.group, self.rank, self.world_size = group, rank, world_size
        self.calls: dict[str, int] = {}
        self.seconds = 0.0

    def _exchange(self, name: str, value: Any) -> list[Any]:
        """What every rank brought to this collective, in rank order."""
        self.calls[name] = self.calls.get(name, 0) + 1
        group = self.group
        group.board[self.rank] = (name, value)
        group.barrier.wait()
        board = list(group.board)
        group.barrier.wait()  # nobody writes the next collective's value before all have read this one's
        assert {other for other, _ in board} == {name}, f"ranks called {[other for other, _ in board]}"
        return [value for _, value in board]

    def all_reduce(self, tensor: Tensor) -> Tensor:
        parts = self._exchange("all_reduce", tensor.clone())
        assert len({(part.shape, part.dtype) for part in parts}) == 1, [part.shape for part in parts]
        wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        total = parts[0].to(wide, copy=True)
        for part in parts[1:]:
            total += part
        return tensor.copy_(total)

    def broadcast_bytes(self, data: bytes | None, root: int = 0) -> bytes:
        assert (data is None) == (self.rank != root)
        found = self._exchange("broadcast_bytes", data)[root]
        assert isinstance(found, bytes)
        return found

    def gather_bytes(self, data: bytes, root: int = 0) -> list[bytes] | None:
        parts = self._exchange("gather_bytes", data)
        return parts if self.rank == root else None

    def gather(self, tensor: Tensor, root: int = 0) -> list[Tensor] | None:
        assert tensor.dim() == 2
        assert tensor.is_contiguous()
        parts = self._exchange("gather", tensor.clone())
        assert len({(part.shape[0], part.dtype) for part in parts}) == 1
        return parts if self.rank == root else None

    def close(self) -> None:
        pass


def run_ranks(world_size: int, fn: Callable[[Communicator], T], timeout_s: float = 60.0) -> list[T]:
    """`fn(comm)` on one thread a rank; the results in rank order.

    The first exception is raised again here, and wakes the ranks that wait for the one that raised.
    """
    group = LocalGroup(world_size, timeout_s)
    results: list[Any] = [None] * world_size
    failures: list[BaseException] = []

    def body(comm: LocalRank) -> None:
        try:
            results[comm.rank] = fn(comm)
        except BaseException as error:  # noqa: BLE001 - handed to the caller
            failures.append(error)
            group.abort()

    threads = [threading.Thread(target=body, args=(comm,), daemon=True) for comm in group.ranks]
    deadline = time.monotonic() + timeout_s
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    if failures:
        raise failures[0]
    stuck = [comm.rank for comm, thread in zip(group.ranks, threads, strict=True) if thread.is_alive()]
    if stuck:
        group.abort()
        raise TimeoutError(f"ranks {stuck} are still running after {timeout_s} s")
    return results

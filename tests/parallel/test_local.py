"""The test harness itself: ranks as threads."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from tests.parallel.local import run_ranks


def test_collectives() -> None:
    def body(comm: Any) -> tuple[Any, ...]:
        summed = comm.all_reduce(torch.full((3,), float(comm.rank), dtype=torch.bfloat16))
        said = comm.broadcast_bytes(b"hello" if comm.rank == 1 else None, root=1)
        heard = comm.gather_bytes(bytes([comm.rank]))
        wide = comm.gather(torch.full((2, comm.rank), comm.rank))
        return summed.tolist(), said, heard, None if wide is None else torch.cat(wide, 1).tolist()

    first, *others = run_ranks(3, body)
    assert first == ([3.0] * 3, b"hello", [b"\0", b"\1", b"\2"], [[1, 2, 2]] * 2)
    assert others == [([3.0] * 3, b"hello", None, None)] * 2


def test_one_ranks_failure_is_everyones() -> None:
    def body(comm: Any) -> None:
        if comm.rank == 1:
            raise KeyError("rank 1")
        comm.all_reduce(torch.ones(1))

    with pytest.raises(KeyError, match="rank 1"):
        run_ranks(3, body)


def test_a_deadline() -> None:
    with pytest.raises(TimeoutError, match=r"ranks \[1\] are still running"):
        run_ranks(2, lambda comm: time.sleep(comm.rank * 1.0), timeout_s=0.2)

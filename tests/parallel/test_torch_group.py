"""A torch.distributed group as the Communicator, its ranks being threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ringlm.errors import ConfigError, PeerLostError
from ringlm.parallel.process_group import process_group
from ringlm.parallel.torch_group import TorchGroup
from tests.parallel.local import run_ranks


def well() -> None:
    pass


def group(comm: Any, check: Callable[[], None] = well, timeout_s: float = 30.0) -> TorchGroup:
    return TorchGroup(comm, "gloo", torch.device("cpu"), check=check, timeout_s=timeout_s)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_sums(world_size: int) -> None:
    def body(comm: Any) -> None:
        ranks = group(comm)
        total = sum(range(1, world_size + 1))
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            tensor = torch.full((5, 7), float(comm.rank + 1), dtype=dtype)
            assert ranks.all_reduce(tensor) is tensor
            assert tensor.tolist() == [[total] * 7] * 5
        whole = torch.full((6, 4), float(comm.rank + 1))
        ranks.all_reduce(whole[:, 1:3])  # not contiguous
        assert whole[0].tolist() == [comm.rank + 1, total, total, comm.rank + 1]
        assert ranks.all_reduce(torch.empty(0, 3)).shape == (0, 3)
        assert (ranks.sequence, ranks.waiting) == (4, False)
        assert ranks.seconds > 0

    run_ranks(world_size, body)


@pytest.mark.parametrize("length", [0, 1, 4095, 4096, 4097, 100_000])
def test_bytes_of_any_length(length: int) -> None:
    data = bytes(range(256)) * (length // 256 + 1)

    def body(comm: Any) -> None:
        ranks = group(comm)
        for root in range(3):
            assert ranks.broadcast_bytes(data[:length] if comm.rank == root else None, root) == data[:length]
            found = ranks.gather_bytes(data[: length * comm.rank], root)
            assert found == ([data[: length * one] for one in range(3)] if comm.rank == root else None)
        if comm.rank == 0:
            with pytest.raises(ValueError, match="has to give its bytes"):
                ranks.broadcast_bytes(None)

    run_ranks(3, body)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_tensors_of_unequal_widths(dtype: torch.dtype) -> None:
    def body(comm: Any) -> None:
        ranks = group(comm)
        found = ranks.gather(torch.full((2, comm.rank), comm.rank, dtype=dtype))
        if comm.rank:
            assert found is None
        else:
            assert found is not None
            assert [(piece.shape, piece.dtype) for piece in found] == [((2, one), dtype) for one in range(3)]
            assert torch.cat(found, 1).tolist() == [[1, 2, 2]] * 2

    run_ranks(3, body)


def test_a_rank_may_wait_for_longer_than_forming_took() -> None:
    def body(comm: Any) -> None:
        ranks = group(comm, timeout_s=5.0)
        if comm.rank == 0:
            time.sleep(6.0)
        assert ranks.broadcast_bytes(b"at last" if comm.rank == 0 else None) == b"at last"

    run_ranks(2, body)


def test_the_end_of_the_ring_wakes_who_waits() -> None:
    lost, heard = threading.Event(), threading.Event()

    def check() -> None:
        if lost.is_set():
            raise PeerLostError("rank 0 is lost", 0)

    def body(comm: Any) -> None:
        ranks = group(comm, check if comm.rank == 1 else well)
        if comm.rank == 1:
            threading.Timer(0.2, lost.set).start()
            with pytest.raises(PeerLostError, match="rank 0 is lost") as caught:
                ranks.broadcast_bytes(None)
            assert caught.value.rank == 0
            assert not ranks.waiting
            with pytest.raises(PeerLostError):
                ranks.all_reduce(torch.ones(1))
            heard.set()
        else:
            assert heard.wait(90.0)
            ranks.broadcast_bytes(b"so that the other's thread ends, too")

    run_ranks(2, body)


def test_nccl_without_cuda_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(ConfigError, match="nccl needs CUDA"):
        process_group(None, "nccl", torch.device("cpu"))

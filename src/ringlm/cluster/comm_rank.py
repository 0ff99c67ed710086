"""One rank of `ringlm bench comm`: it makes the calls that it is told to, and says how long each took.

    python -m ringlm.cluster.comm_rank FD

FD is a socket to the process that measures (comm_bench.py), and its end is this rank's.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable

import torch

from ringlm.cluster.channel import Channel, ChannelClosed
from ringlm.cluster.comm_bench import Began, Block, Failure, Start, Times, ToRank
from ringlm.errors import ConfigError, RingError, RingLMError
from ringlm.parallel.process_group import check_nccl, process_group
from ringlm.ring import Ring, connect

_TIMEOUT_S = 60.0  # of one call, and of forming the groups

Call = Callable[[torch.Tensor], object]


def serve(channel: Channel[ToRank]) -> None:
    """Form the groups, then make calls until the channel ends, by ChannelClosed. Raises RingLMError."""
    start = channel.receive(_TIMEOUT_S)
    if not isinstance(start, Start):
        raise RingError("no plan came; this module is 'ringlm bench comm's own.")
    plan = start.plan
    torch.set_num_threads(1)
    device = pick_device(plan.device, plan.against, start.ring.rank, start.ring.world_size)
    dtype = getattr(torch, plan.dtype)
    with connect(start.ring.replace(timeout_s=_TIMEOUT_S)) as ring:
        calls: dict[str, Call] = {"ring": ring.all_reduce}
        if plan.against is not None:
            calls[plan.against] = group_call(ring, plan.against, device)
        tensors = {size: torch.full((size // dtype.itemsize,), 0.0, dtype=dtype, device=device) for size in plan.sizes}
        channel.send(Began({size: ring.algorithm("all_reduce", size) for size in plan.sizes}))
        while True:
            block = channel.receive()
            assert isinstance(block, Block)
            channel.send(Times(timed(calls[block.backend], tensors[block.nbytes], block.count)))


def pick_device(name: str, against: str | None, rank: int, world_size: int) -> torch.device:
    """Where this rank's tensors are. Ranks share a GPU, but for nccl, which gives each one of its own. Raises
    ConfigError where there are none, or too few."""
    if name == "cpu":
        return torch.device("cpu")
    if against == "nccl":
        check_nccl(torch.device("cuda"))
    count = torch.cuda.device_count()
    if not count:
        raise ConfigError(f"--device cuda: torch {torch.__version__} finds no such device here; leave it out.")
    if against == "nccl" and count < world_size:
        raise ConfigError(f"nccl wants a GPU for each of {world_size} ranks, and there are {count}; try gloo.")
    return torch.device("cuda", rank if against == "nccl" else 0)


def group_call(ring: Ring, backend: str, device: torch.device) -> Call:
    """A torch.distributed group's all-reduce."""
    group = process_group(ring, backend, device, timeout_s=_TIMEOUT_S)

    def all_reduce(tensor: torch.Tensor) -> None:
        group.allreduce([tensor]).wait()

    return all_reduce


def timed(call: Call, tensor: torch.Tensor, count: int) -> list[float]:
    """Seconds of each of `count` calls, until the sum is there on the device. The first after another's is left out."""
    times = []
    for _ in range(count + 1):
        started = time.perf_counter()
        call(tensor)
        if tensor.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return times[1:]


def main() -> int:
    """The process; its exit status."""
    channel: Channel[ToRank] = Channel(socket.socket(fileno=int(sys.argv[1])), ToRank)
    try:
        serve(channel)
    except ChannelClosed:
        return 0
    except Exception as error:  # noqa: BLE001  # the last place; every kind is told
        if os.environ.get("RINGLM_DEBUG"):
            traceback.print_exc()
        text = str(error) if isinstance(error, RingLMError) else f"{type(error).__name__}: {error}"
        with contextlib.suppress(ChannelClosed):
            channel.send(Failure(text, isinstance(error, ConfigError)))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A torch.distributed process group of ranks that can talk already: rank 0 offers a store, the others come to it.

It is made directly, beside torch's global state, so that a program's own default group stays as it is.
"""

from __future__ import annotations

import datetime
import socket
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store, TCPStore

from ringlm.errors import ConfigError, RingError
from ringlm.parallel.communicator import Communicator

# torch has one interface for both (`allreduce`, `broadcast`, …, each of which gives a Work), and no type for it.
Group = Any


def check_nccl(device: torch.device) -> None:
    """Raises ConfigError where NCCL cannot move tensors of `device`."""
    if not torch.cuda.is_available() or not dist.is_nccl_available():
        raise ConfigError(f"nccl needs CUDA, and torch {torch.__version__} finds none here; choose gloo.")
    if device.type != "cuda":
        raise ConfigError(f"nccl moves tensors of CUDA devices only, and this rank's are on {device}; choose gloo.")


def process_group(
    comm: Communicator,
    backend: str,
    device: torch.device,
    host: str = "127.0.0.1",
    port: int = 0,
    timeout_s: float = 120.0,
) -> Group:
    """The gloo or nccl group of all of `comm`'s ranks, each of which calls this. `host` is an address of this rank's
    that the others reach: rank 0's store listens there, on `port` (0: a free one), and gloo's links on every rank.

    Raises ConfigError for nccl without CUDA, and RingError where the group cannot be formed.
    """
    if backend == "nccl":
        check_nccl(device)
    timeout = datetime.timedelta(seconds=timeout_s)
    try:
        store = _store(comm, host, port, timeout)
        if backend == "nccl":
            return _nccl(store, comm, device, timeout)
        return _gloo(store, comm, host, timeout)
    except (RuntimeError, OSError) as error:
        raise RingError(f"the {backend} group of {comm.world_size} ranks could not be formed: {error}") from error


def _store(comm: Communicator, host: str, port: int, timeout: datetime.timedelta) -> Store:
    """Rank 0's key-value store, whose address goes to the others over `comm`."""
    if comm.rank != 0:
        there, _, number = comm.broadcast_bytes(None).decode().rpartition(":")
        return TCPStore(there, int(number), comm.world_size, False, timeout)
    # A listening socket of ours: torch's own would be open to every network that this machine is in.
    listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    port = listening.getsockname()[1]
    store = TCPStore(
        host, port, comm.world_size, True, timeout, wait_for_workers=False, master_listen_fd=listening.detach()
    )
    comm.broadcast_bytes(f"{host}:{port}".encode())
    return store


def _gloo(store: Store, comm: Communicator, host: str, timeout: datetime.timedelta) -> Group:
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname=host)]
    options._timeout = timeout
    options._threads = 2  # as torch itself gives it
    return gloo(store, comm.rank, comm.world_size, options)


def _nccl(store: Store, comm: Communicator, device: torch.device, timeout: datetime.timedelta) -> Group:
    nccl: Any = dist.ProcessGroupNCCL  # not in every build of torch
    torch.cuda.set_device(device)
    options = nccl.Options()
    options._timeout = timeout
    return nccl(store, comm.rank, comm.world_size, options)

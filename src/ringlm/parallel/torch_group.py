"""A Communicator over a torch.distributed group, for `--backend gloo` and `nccl`.

Sums go through the group that was asked for; bytes and gathered tensors always through gloo, since a daemon that
waits for its next step within NCCL would keep its GPU busy. Whether the other ranks live is not the group's to
judge but the ring's control plane's: while it waits it looks there, twice a second.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch._C._distributed_c10d import AllgatherOptions, AllreduceOptions, BroadcastOptions, GatherOptions

from ringlm.errors import RingError
from ringlm.parallel.communicator import Communicator
from ringlm.parallel.process_group import Group, process_group

_LOOK = datetime.timedelta(seconds=0.5)
# Of one call: a daemon waits for its next step within one, for as long as nobody asks anything.
_LIMIT = datetime.timedelta(days=30)
_CAUSE_S = 8.0  # what ends a group is known to the control plane by then: silence takes 5 s
_INLINE = 4096  # bytes that travel in one broadcast with their length

_T = TypeVar("_T")


class TorchGroup:
    """All ranks of a ring, which exchange tensors and bytes through torch.distributed.

    Every call raises what ended the ring (PeerLostError names the rank), and RingError where the group fails by
    itself. `seconds` adds up the time in calls, `sequence` counts them, `waiting` says whether one is under way.
    After a failure the process had better end without awaiting threads: one of torch's may be in a call that no rank
    will answer.
    """

    def __init__(
        self,
        comm: Communicator,
        backend: str,
        device: torch.device,
        *,
        check: Callable[[], None],
        host: str = "127.0.0.1",
        port: int = 0,
        timeout_s: float = 120.0,
    ) -> None:
        """Form the group; every rank of `comm` calls this. `check` raises what ended the ring, if anything has.
        Rank 0's store listens on `host` and `port`, and `timeout_s` is for forming. Raises RingError."""
        self.rank = comm.rank
        self.world_size = comm.world_size
        self.seconds = 0.0
        self.sequence = 0
        self.waiting = False
        self._backend = backend
        self._check = check
        self._gloo: Group = process_group(comm, "gloo", device, host, port, timeout_s)
        self._sums: Group = self._gloo
        if backend == "nccl":
            self._sums = process_group(comm, "nccl", device, host, 0, timeout_s)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over ranks of a tensor of any shape, one dtype and shape on all, in place and returned; the same
        bits on every rank. Half types are rounded as the backend does it, which may be at every rank."""
        if not tensor.numel():
            return tensor
        there = tensor.is_contiguous() and tensor.device.type in ("cpu", "cuda")
        flat = tensor if there else (tensor if tensor.is_cuda else tensor.cpu()).contiguous()
        options = AllreduceOptions()
        options.timeout = _LIMIT
        self._run(lambda: self._finish(self._sums.allreduce([flat], options), flat))
        return tensor if there else tensor.copy_(flat)

    def broadcast_bytes(self, data: bytes | None, root: int = 0) -> bytes:
        """`root`'s bytes on every rank; the others pass None. Raises ValueError where the root does."""
        if self.rank == root and data is None:
            raise ValueError("the root of a broadcast has to give its bytes.")
        return self._run(lambda: self._broadcast_bytes(data or b"", root))

    def gather_bytes(self, data: bytes, root: int = 0) -> list[bytes] | None:
        """Every rank's bytes in rank order on `root`, None elsewhere."""
        found = self._run(lambda: self._gather(_tensor(data), root))
        return None if found is None else [piece.numpy().tobytes() for piece in found]

    def gather(self, tensor: torch.Tensor, root: int = 0) -> list[torch.Tensor] | None:
        """Every rank's contiguous 2-D tensor in rank order on `root`, on its tensor's device; None elsewhere. One
        dtype and one dim 0 for all; dim 1 may differ."""
        if tensor.is_cuda:
            self._run(self._drain)
        flat = tensor.cpu().reshape(-1).view(torch.uint8)
        found = self._run(lambda: self._gather(flat, root))
        if found is None:
            return None
        rows = tensor.shape[0]
        return [
            tensor if rank == root else piece.view(tensor.dtype).view(rows, -1 if rows else 0).to(tensor.device)
            for rank, piece in enumerate(found)
        ]

    def close(self) -> None:
        """Nothing: the group ends with its process, and the ring tells the others."""

    # -- within --------------------------------------------------------------------------------

    def _broadcast_bytes(self, data: bytes, root: int) -> bytes:
        first = torch.zeros(8 + _INLINE, dtype=torch.uint8)
        if self.rank == root:
            head = len(data).to_bytes(8, "little") + data[:_INLINE]
            first[: len(head)] = _tensor(head)
        self._broadcast(first, root)
        received = first.numpy().tobytes()
        length = int.from_bytes(received[:8], "little")
        if length <= _INLINE:
            return received[8 : 8 + length]
        rest = _tensor(data[_INLINE:]) if self.rank == root else torch.empty(length - _INLINE, dtype=torch.uint8)
        self._broadcast(rest, root)
        return received[8:] + rest.numpy().tobytes()

    def _broadcast(self, tensor: torch.Tensor, root: int) -> None:
        options = BroadcastOptions()
        options.rootRank, options.rootTensor, options.timeout = root, 0, _LIMIT
        self._finish(self._gloo.broadcast([tensor], options), tensor)

    def _gather(self, mine: torch.Tensor, root: int) -> list[torch.Tensor] | None:
        """Every rank's bytes on `root`: the lengths first, then all as long as the longest, as gloo wants them."""
        length = torch.tensor([mine.numel()])
        lengths = [torch.empty_like(length) for _ in range(self.world_size)]
        options = AllgatherOptions()
        options.timeout = _LIMIT
        self._finish(self._gloo.allgather([lengths], [length], options), length)
        sizes = [int(one) for one in lengths]
        padded = torch.zeros(max(1, *sizes), dtype=torch.uint8)
        padded[: mine.numel()] = mine
        into = [torch.empty_like(padded) for _ in sizes] if self.rank == root else []
        last = GatherOptions()
        last.rootRank, last.timeout = root, _LIMIT
        self._finish(self._gloo.gather([into] if into else [], [padded], last), padded)
        return [piece[:size] for piece, size in zip(into, sizes, strict=True)] if into else None

    def _run(self, call: Callable[[], _T]) -> _T:
        """One call of this communicator, counted and timed."""
        self._check()
        started = time.perf_counter()
        self.sequence += 1
        self.waiting = True
        try:
            return call()
        finally:
            self.waiting = False
            self.seconds += time.perf_counter() - started

    def _finish(self, work: Any, tensor: torch.Tensor) -> None:
        """Wait until `work` is done and its result is in `tensor`. With NCCL what follows is only queued behind it,
        until `gather` needs the result: with a limit, its wait would look once a millisecond."""
        if tensor.is_cuda and self._backend == "nccl":
            work.wait()
            return
        while True:
            done = work.is_completed()
            try:
                work.wait(_LOOK)
                break
            except RuntimeError as error:
                if done:
                    raise self._cause(error) from error
                self._check()
        if tensor.is_cuda:
            self._drain()

    def _drain(self) -> None:
        """Wait for the device, which waits without end for a rank that is lost."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        due = time.perf_counter() + _LOOK.total_seconds()
        while not event.query():  # type: ignore[no-untyped-call]
            time.sleep(0)
            if time.perf_counter() > due:
                self._check()
                due += _LOOK.total_seconds()

    def _cause(self, error: RuntimeError) -> RingError:
        """Raise what is behind a failure of the group, once the control plane knows; else the failure itself."""
        deadline = time.monotonic() + _CAUSE_S
        while time.monotonic() < deadline:
            self._check()
            time.sleep(0.02)
        return RingError(f"{self._backend} failed on rank {self.rank}, whose ring is well: {error}")


def _tensor(data: bytes) -> torch.Tensor:
    """`data` as a tensor of its own bytes."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)

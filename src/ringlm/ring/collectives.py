"""The ring itself: all_reduce, broadcast and gather over links between all pairs of ranks.

Contributions are summed in rank order, in float32 for the half types, and rounded once, whatever the
size: every rank holds the same bits. What it does not know: models, requests, how the links came to be.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import TypeVar

import torch

from ringlm.errors import PeerError, PeerLostError, RingError, RingLMError
from ringlm.ring import reduce, wire
from ringlm.ring.control import ControlPlane
from ringlm.ring.link import SPIN_S, Lane, Link
from ringlm.ring.listener import Listener
from ringlm.ring.mesh import Mesh
from ringlm.ring.wire import HEADER, MAX_MESSAGE_BYTES, Operation

SEGMENT_BYTES = 1 << 19  # received, added and forwarded while still in the cache
DIRECT_BYTES = 1 << 15  # up to here whole tensors are exchanged, above each rank sums its own chunk
# Two ranks that each sum everything need not await each other's sums; above this, summing half is faster.
_STREAMED_SEGMENTS = 4

_T = TypeVar("_T")


class Ring:
    """Connected ranks. Every rank calls the same collectives in the same order, from one thread.

    A failed collective ends the ring on all ranks: each raises the error that names the cause, at once
    and from then on. `sequence` counts collectives and `seconds` adds up the time spent in them.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        links: Sequence[Link],
        *,
        control: ControlPlane | None = None,
        listener: Listener | None = None,
        timeout_s: float = float("inf"),
        machine_ranks: int = 1,
        crowded: bool = False,
        epoch: int = 0,
        segment_bytes: int = SEGMENT_BYTES,
        direct_bytes: int = DIRECT_BYTES,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.machine_ranks = machine_ranks  # of them, how many share this rank's machine
        self.epoch = epoch
        self.seconds = 0.0
        self.sequence = 0
        self._call = b""  # the header of the collective under way
        self._control = control
        self._listener = listener
        self._timeout_s = timeout_s
        self._star = crowded and world_size > 2
        self._direct_bytes = min(direct_bytes, segment_bytes)
        self._mesh = Mesh(rank, links, 0.0 if crowded else SPIN_S, segment_bytes)
        self._error: RingError | None = None
        self._closed = False
        if control is not None:
            control.start(lambda: self._call, self._end)

    # -- collectives ---------------------------------------------------------------------------

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` over all ranks, in place; the same bits on every rank. Returns `tensor`.

        Any shape, of float32, bfloat16, float16, float64, int32, int64 or uint8. A tensor that is not
        contiguous, or not in host memory, goes through a copy. Raises PeerLostError,
        CollectiveTimeoutError or DesyncError, and ValueError for another dtype.
        """
        if self.world_size == 1:
            return tensor
        flat = _host(tensor)
        nbytes = flat.nbytes
        move = partial(self._algorithm(nbytes), self._mesh, flat)
        self._run(Operation.ALL_REDUCE, flat.dtype, 0, nbytes, move)
        return _restore(tensor, flat)

    def broadcast(self, tensor: torch.Tensor, root: int = 0) -> torch.Tensor:
        """Overwrite `tensor` on every rank with rank `root`'s, of the same dtype and size. Returns `tensor`."""
        if self.world_size == 1:
            return tensor
        flat, mesh = _host(tensor), self._mesh
        data = wire.view(flat)

        def move(header: bytes, deadline: float) -> None:
            if self.rank == root:
                mesh.pump(mesh.lanes(header, data), deadline)
            else:
                mesh.receive(root, header, data, deadline)

        self._run(Operation.BROADCAST, flat.dtype, root, len(data), move)
        return _restore(tensor, flat)

    def gather(self, tensor: torch.Tensor, root: int = 0) -> list[torch.Tensor] | None:
        """Every rank's (rows, columns) tensor on rank `root`, in rank order; None elsewhere.

        Ranks agree on dtype and rows; columns may differ, and be none.
        """
        if tensor.dim() != 2:
            raise ValueError(f"gather takes (rows, columns) tensors, not {tuple(tensor.shape)}.")
        if self.world_size == 1:
            return [tensor]
        flat = _host(tensor)
        rows, row_bytes = tensor.shape[0], tensor.shape[0] * tensor.element_size()

        def room(nbytes: int) -> torch.Tensor:
            columns, odd = divmod(nbytes, row_bytes) if row_bytes else (0, nbytes)
            if odd:
                raise ValueError(f"{nbytes:,} bytes are not {rows} rows of {tensor.dtype}")
            return torch.empty(rows, columns, dtype=tensor.dtype)

        received = self._gather(Operation.GATHER, tensor.dtype, wire.view(flat), root, room)
        return [tensor if piece is None else piece for piece in received] if received is not None else None

    def broadcast_bytes(self, data: bytes | None, root: int = 0) -> bytes:
        """Rank `root`'s `data` on every rank; the others pass None."""
        if self.rank != root:
            data = None
        elif data is None:
            raise ValueError("the root of a broadcast has to give its bytes.")
        elif self.world_size == 1:
            return data
        mesh = self._mesh

        def move(header: bytes, deadline: float) -> bytes:
            if data is not None:
                mesh.pump(mesh.lanes(header + data), deadline)
                return data
            received = bytearray(mesh.await_size(root, header, deadline))
            lane = Lane(mesh.links[root])
            lane.receive(memoryview(received))
            mesh.pump([lane], deadline)
            return bytes(received)

        return self._run(Operation.BROADCAST_BYTES, torch.uint8, root, _checked_size(data or b""), move)

    def gather_bytes(self, data: bytes, root: int = 0) -> list[bytes] | None:
        """Every rank's `data` on rank `root`, in rank order; None elsewhere."""
        if self.world_size == 1:
            return [data]

        def room(nbytes: int) -> torch.Tensor:
            return torch.empty(nbytes, dtype=torch.uint8)

        received = self._gather(Operation.GATHER_BYTES, torch.uint8, memoryview(data), root, room)
        if received is None:
            return None
        return [data if piece is None else bytes(wire.view(piece)) for piece in received]

    # -- ending --------------------------------------------------------------------------------

    @property
    def waiting(self) -> bool:
        """Whether this rank is within a collective."""
        return bool(self._call)

    def check(self) -> None:
        """Raise what ended the ring, if it has ended: for a rank that has nothing to do meanwhile."""
        if self._error is not None:
            raise self._error.with_traceback(None)

    def abort(self, text: str) -> None:
        """End the ring on every rank: this one has failed, and `text` are its last words. From any thread."""
        if self._control is not None:
            self._control.fail(PeerLostError(f"rank {self.rank} failed: {text}", self.rank))

    def close(self) -> None:
        """Leave the ring in order and free everything it holds. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._error = self._error or RingError("the ring is closed.")
        if self._listener is not None:
            self._listener.close()
        if self._control is not None:
            self._control.close()
        for link in self._mesh.links.values():
            link.sock.close()

    def __enter__(self) -> Ring:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.abort(last_words(error))
        self.close()

    # -- within --------------------------------------------------------------------------------

    def _run(
        self, operation: Operation, dtype: torch.dtype, root: int, nbytes: int, move: Callable[[bytes, float], _T]
    ) -> _T:
        """One collective: `move` the bytes, given the header and the deadline. Its failure ends the ring."""
        if self._error is not None:
            raise self._error.with_traceback(None)
        if not 0 <= root < self.world_size:
            raise ValueError(f"root is {root}; the ranks are 0 to {self.world_size - 1}.")
        started = time.perf_counter()
        try:
            self.sequence += 1
            self._call = header = HEADER.pack(self.sequence, self.epoch, operation, wire.DTYPES[dtype], root, nbytes)
            return move(header, started + self._timeout_s)
        except PeerError as error:
            cause = self._control.settle(error) if self._control is not None else error
            if cause is error:
                raise
            raise cause from error
        except BaseException as error:
            self.abort(last_words(error))
            raise
        finally:
            self._call = b""
            self.seconds += time.perf_counter() - started

    def _gather(
        self,
        operation: Operation,
        dtype: torch.dtype,
        data: memoryview,
        root: int,
        room: Callable[[int], torch.Tensor],
    ) -> list[torch.Tensor | None] | None:
        """The others' bytes in tensors that `room` makes, None in this rank's own place; None off root."""
        mesh = self._mesh

        def move(header: bytes, deadline: float) -> list[torch.Tensor | None] | None:
            if self.rank != root:
                mesh.pump([Lane(mesh.links[root], (header, data))], deadline)
                return None
            received: list[torch.Tensor | None] = [None] * self.world_size
            lanes = mesh.lanes()
            for lane in lanes:
                nbytes = mesh.await_size(lane.link.peer, header, deadline)
                try:
                    piece = room(nbytes)
                except ValueError as error:
                    raise mesh.desync(lane.link, header, str(error)) from None
                received[lane.link.peer] = piece
                lane.receive(wire.view(piece))
            mesh.pump(lanes, deadline)
            return received

        return self._run(operation, dtype, root, _checked_size(data), move)

    def _algorithm(self, nbytes: int) -> reduce.Algorithm:
        """How to reduce `nbytes`: the same on every rank."""
        if nbytes <= self._direct_bytes:
            return reduce.through_rank_0 if self._star else reduce.direct
        segments = nbytes / self._mesh.segment_bytes
        if self.world_size > 2 or segments > _STREAMED_SEGMENTS:
            return reduce.by_owners
        return reduce.direct if segments <= 1 else reduce.streamed

    def _end(self, error: PeerError) -> None:
        """The ring has ended: say so from now on, and wake whoever waits on a link. Runs on any thread."""
        self._error = error
        for link in self._mesh.links.values():
            link.shut()


def _host(tensor: torch.Tensor) -> torch.Tensor:
    """The elements, flat and contiguous in host memory: the tensor's own where they are so already."""
    if tensor.dtype not in wire.DTYPES:
        raise ValueError(f"the ring does not carry {tensor.dtype}; it carries {', '.join(map(str, wire.DTYPES))}.")
    if tensor.is_cpu and tensor.is_contiguous() and not tensor.requires_grad:
        return tensor if tensor.dim() == 1 else tensor.view(-1)
    if tensor.is_cuda:  # pinned memory, which torch keeps for the next call, is copied several times as fast
        flat = torch.empty(tensor.numel(), dtype=tensor.dtype, pin_memory=True)
        flat.view(tensor.shape).copy_(tensor.detach())
        return flat
    return tensor.detach().to("cpu").contiguous().view(-1)


def _restore(tensor: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
    """`tensor`, with the elements of `flat` if those lie elsewhere."""
    if flat.data_ptr() != tensor.data_ptr():
        tensor.detach().copy_(flat.view(tensor.shape), non_blocking=tensor.is_cuda)
    return tensor


def _checked_size(data: bytes | memoryview) -> int:
    """Its length in bytes. Raises ValueError where the other ranks would refuse it."""
    if len(data) > MAX_MESSAGE_BYTES:
        raise ValueError(f"{len(data):,} bytes in one message; at most {MAX_MESSAGE_BYTES:,} are carried.")
    return len(data)


def last_words(error: BaseException) -> str:
    """Why a rank ends, for the others to read."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted by its user"
    if isinstance(error, SystemExit):
        return f"it exited with status {error.code}"
    return str(error) if isinstance(error, RingLMError) else f"{type(error).__name__}: {error}"

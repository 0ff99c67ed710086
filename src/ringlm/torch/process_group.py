"""A ProcessGroup of torch.distributed over one ring: c10d's operations as collectives.

Torch looks methods up by name, from Python all of them, from C++ (DistributedDataParallel, functional collectives)
some. Each takes tensors and options of c10d and gives a Work. Ranks are those of the group. What is asked for
synchronously is done on the caller's thread, after what is queued, and the rest in the background, in order.
What it does not know: how the ring came to be.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import time
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch._C._distributed_c10d import Store
from torch.distributed import ProcessGroup, Work

from ringlm.errors import CollectiveTimeoutError
from ringlm.ring import Ring
from ringlm.torch import elsewhere
from ringlm.torch.reducing import all_reduce, all_reduce_sparse, reduction_of
from ringlm.torch.tensors import bare, cut, flat, parts
from ringlm.torch.work import RingWork, renamed

Tensors = list[torch.Tensor]
_Base: Any = ProcessGroup  # whose methods torch declares with more forms than it calls

_BARRIER_TAG = (1 << 63) + 1  # of letters of monitored_barrier; torch's tags are below


class RingProcessGroup(_Base):  # type: ignore[misc]
    """The ranks of `ring`, which are `ranks` of all (empty: they are all)."""

    supports_splitting = supports_coalescing = supports_time_estimate = False  # as of a torch Backend

    def __init__(self, ring: Ring, store: Store, timeout: datetime.timedelta, ranks: Sequence[int]) -> None:
        super().__init__(ring.rank, ring.world_size)
        self._ring = ring
        self._store = store
        self._timeout = timeout
        self._ranks = tuple(ranks)
        self._name = self._description = ""
        self._others: dict[str, ProcessGroup | None] = {}
        # A process that ends without destroy_process_group leaves in order, too: others may still read what it sent.
        self._end = weakref.finalize(self, _leave, ring, os.getpid())

    # -- what torch wants to know --------------------------------------------------------------

    def getBackendName(self) -> str:
        return "ring"

    def getGroupName(self) -> str:
        return self._name

    def setGroupName(self, name: str) -> None:
        self._name = name

    def getGroupDesc(self) -> str:
        return self._description

    def setGroupDesc(self, description: str) -> None:
        self._description = description

    def get_group_store(self) -> Store:
        return self._store

    def set_timeout(self, timeout: datetime.timedelta) -> None:
        """Of every operation from now on that has none of its own."""
        self._timeout = timeout
        self._ring.timeout_s = timeout.total_seconds()

    _set_default_timeout = set_timeout

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device(name) for name in elsewhere.backends(self)]

    def _get_backend(self, device: torch.device) -> Any:
        other = self._other(device.type)
        return self if other is None else other._get_backend(device)

    def shutdown(self) -> None:
        """Leave the group in order. Idempotent."""
        for other in self._others.values():
            if other is not None:
                other.shutdown()
        self._end()

    def abort(self) -> None:
        """End the group on all ranks."""
        self._ring.abort("its program called abort")
        self._end()

    # -- reducing ------------------------------------------------------------------------------

    @elsewhere.other_devices
    def allreduce(self, tensors: Tensors, opts: Any) -> Work:
        if tensors[0].is_sparse:
            return self._do(opts, tensors, all_reduce_sparse, self._ring, tensors[0], reduction_of(opts))
        return self._do(opts, tensors, all_reduce, self._ring, tensors, reduction_of(opts))

    @elsewhere.other_devices
    def allreduce_coalesced(self, tensors: Tensors, opts: Any) -> Work:
        return self._do(opts, tensors, all_reduce, self._ring, tensors, reduction_of(opts))

    @elsewhere.other_devices
    def reduce(self, tensors: Tensors, opts: Any) -> Work:
        tensor, reduction = bare(tensors[opts.rootTensor]), reduction_of(opts)
        return self._do(opts, tensors, self._ring.reduce, tensor, opts.rootRank, reduction)

    @elsewhere.other_devices
    def reduce_scatter(self, outputs: Tensors, inputs: list[Tensors], opts: Any) -> Work:
        call = partial(self._ring.reduce_scatter, reduction=reduction_of(opts), out=bare(outputs[0]))
        return self._do(opts, outputs, call, [bare(tensor) for tensor in inputs[0]])

    @elsewhere.other_devices
    def reduce_scatter_single(self, output: torch.Tensor, input: torch.Tensor, opts: Any) -> Work:
        return self.reduce_scatter_single_coalesced([output], [input], opts)

    @elsewhere.other_devices
    def reduce_scatter_single_coalesced(self, outputs: Tensors, inputs: Tensors, opts: Any) -> Work:
        reduction = reduction_of(opts)

        def call() -> None:
            for output, input in zip(outputs, inputs, strict=True):
                self._ring.reduce_scatter(cut(input.contiguous(), self._ring.world_size), reduction, flat(output))

        return self._do(opts, outputs, call)

    def barrier(self, opts: Any = None) -> Work:
        return self._do(opts, [], self._ring.barrier)

    # -- moving --------------------------------------------------------------------------------

    @elsewhere.other_devices
    def broadcast(self, tensors: Tensors, opts: Any) -> Work:
        return self._do(opts, tensors, self._ring.broadcast, bare(tensors[opts.rootTensor]), opts.rootRank)

    @elsewhere.other_devices
    def allgather(self, outputs: list[Tensors], inputs: Tensors, opts: Any) -> Work:
        return self.allgather_coalesced(outputs, inputs, opts)

    @elsewhere.other_devices
    def allgather_coalesced(self, outputs: list[Tensors], inputs: Tensors, opts: Any) -> Work:
        def call() -> None:
            for tensor, pieces in zip(inputs, outputs, strict=True):
                self._ring.all_gather(bare(tensor), [bare(piece) for piece in pieces])

        return self._do(opts, [piece for pieces in outputs for piece in pieces], call)

    @elsewhere.other_devices
    def all_gather_single(self, output: torch.Tensor, input: torch.Tensor, opts: Any) -> Work:
        return self.all_gather_single_coalesced([output], [input], opts)

    @elsewhere.other_devices
    def all_gather_single_coalesced(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> Work:
        def call() -> None:
            for output, input in zip(outputs, inputs, strict=True):
                self._ring.all_gather(flat(input.contiguous()), cut(output, self._ring.world_size))

        return self._do(opts, outputs, call)

    @elsewhere.other_devices
    def gather(self, outputs: list[Tensors], inputs: Tensors, opts: Any) -> Work:
        pieces = [bare(piece) for piece in outputs[0]] if outputs else None
        found = outputs[0] if outputs else []
        return self._do(opts, found, self._ring.gather, bare(inputs[0]), opts.rootRank, pieces)

    @elsewhere.other_devices
    def scatter(self, outputs: Tensors, inputs: list[Tensors], opts: Any) -> Work:
        pieces = [bare(piece) for piece in inputs[0]] if inputs else None
        return self._do(opts, outputs, self._ring.scatter, pieces, bare(outputs[0]), opts.rootRank)

    @elsewhere.other_devices
    def alltoall(self, outputs: Tensors, inputs: Tensors, opts: Any) -> Work:
        pieces, into = [bare(piece) for piece in inputs], [bare(piece) for piece in outputs]
        return self._do(opts, outputs, self._ring.all_to_all, pieces, into)

    @elsewhere.other_devices
    def all_to_all_single(
        self, output: torch.Tensor, input: torch.Tensor, output_sizes: list[int], input_sizes: list[int], opts: Any
    ) -> Work:
        """Sizes are of dim 0, by rank; none: all are equal."""
        pieces = parts(input.contiguous(), input_sizes, self._ring.world_size)
        into = parts(output, output_sizes, self._ring.world_size)
        return self._do(opts, [output], self._ring.all_to_all, pieces, into)

    # Names by which torch's older versions, and what was written for them, ask for the same.
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    alltoall_base = all_to_all_single

    # -- from one rank to another --------------------------------------------------------------

    @elsewhere.other_devices
    def send(self, tensors: Tensors, to: int, tag: int) -> Work:
        return self._do(None, tensors, self._ring.send, bare(tensors[0]), to, tag)

    @elsewhere.other_devices
    def recv(self, tensors: Tensors, source: int | None, tag: int) -> Work:
        handle = self._ring.expect(bare(tensors[0]), source, tag)
        what = f"rank {source}" if source is not None else "any rank"
        return RingWork(tensors, handle, self._ring.timeout_s, partial(self._late, what, source, tag), self._named)

    @elsewhere.other_devices
    def recv_anysource(self, tensors: Tensors, tag: int) -> Work:
        return self.recv(tensors, None, tag)

    def _start_coalescing(self, device: torch.device) -> None:
        """Nothing: what follows is queued as it comes."""

    def _end_coalescing(self, device: torch.device) -> Work:
        """All that was queued."""
        return self._do(None, [], self._ring.check)

    # -- within --------------------------------------------------------------------------------

    def _do(self, options: Any, tensors: Tensors, call: Callable[..., Any], *arguments: Any) -> Work:
        """Make a collective of the ring that fills `tensors`, now or in the background."""
        ring = self._ring
        limit = options.timeout.total_seconds() if options is not None else 0.0
        if limit > 0:
            call, arguments = self._within, (limit, call, *arguments)
        if options is None or options.asyncOp:
            with self._named():
                return RingWork(tensors, ring.submit(call, *arguments), named=self._named)
        with self._named(), ring.turn:
            call(*arguments)
        return RingWork(tensors)

    def _within(self, limit_s: float, call: Callable[..., Any], *arguments: Any) -> None:
        """Make `call` within `limit_s` in place of the group's timeout."""
        usual, self._ring.timeout_s = self._ring.timeout_s, limit_s
        try:
            call(*arguments)
        finally:
            self._ring.timeout_s = usual

    def _named(self) -> contextlib.AbstractContextManager[None]:
        """A context whose errors number ranks as all know them."""
        return renamed(self._ranks) if self._ranks else contextlib.nullcontext()

    def _late(self, what: str, source: int | None, tag: int) -> Exception:
        """Nothing has come from `what` in time: end the group."""
        text = f"{what} sent nothing with tag {tag} within {self._ring.timeout_s:g} s; it may be busy, stopped or gone."
        return self._ring.settle(CollectiveTimeoutError(text, int(self._ring.rank == 0) if source is None else source))

    def _other(self, device: str) -> ProcessGroup | None:
        """Who has the tensors of a type of device that "cpu:ring,cuda:nccl" gives to another backend."""
        return elsewhere.group(self, device, self._others, self._store, self._timeout)

    def monitored_barrier(self, timeout: datetime.timedelta | None, wait_all_ranks: bool) -> None:
        """See `ringlm.torch.monitored_barrier`."""
        ring, limit_s = self._ring, (timeout or self._timeout).total_seconds()
        if ring.rank != 0:
            self.send([torch.zeros(1)], 0, _BARRIER_TAG).wait()
            back = ring.expect(torch.zeros(1), 0, _BARRIER_TAG)
            late = partial(self._late, "rank 0", 0, _BARRIER_TAG)
            RingWork([], back, limit_s + 1.0, late, self._named).wait()
            return
        deadline = time.monotonic() + limit_s
        here = {peer: ring.expect(torch.zeros(1), peer, _BARRIER_TAG) for peer in range(1, ring.world_size)}
        missing = []
        for peer, handle in here.items():
            try:
                handle.wait(max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                missing.append(peer)
                if not wait_all_ranks:
                    break
        if missing:
            names = ", ".join(map(str, missing))
            text = f"rank {names} did not reach monitored_barrier within {limit_s:g} s."
            with self._named():
                raise ring.settle(CollectiveTimeoutError(text, missing[0]))
        for peer in here:
            self.send([torch.zeros(1)], peer, _BARRIER_TAG).wait()


def _leave(ring: Ring, process: int) -> None:
    if os.getpid() == process:  # not one that was forked from it, as DataLoader does
        ring.close()

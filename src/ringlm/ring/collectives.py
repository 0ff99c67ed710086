"""The collectives of a group of ranks: what each gives, what each takes, and by which algorithm.

A collective is a plan (which bytes go to which rank, which come from where) that `lane.pump` carries
out. What it does not know: how the links came to be, models, requests.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch

from ringlm.errors import PeerError, RingLMError
from ringlm.ring import combine, letters, reducing, wire
from ringlm.ring.algorithms import Limits, Topology, choose
from ringlm.ring.background import Handle
from ringlm.ring.devices import Staging
from ringlm.ring.lane import Room
from ringlm.ring.mailbox import Wanted
from ringlm.ring.mesh import Mesh
from ringlm.ring.wire import MAX_MESSAGE_BYTES, Operation, pack_call

if TYPE_CHECKING:
    from ringlm.ring.ring import Ring

_T = TypeVar("_T")
_MAX_CHOICES = 256
_REDUCERS: dict[str, reducing.Algorithm] = {
    "direct": reducing.direct,
    "owners": reducing.owners,
    "chain": reducing.chain,
}


class Collectives:
    """What the ranks of a group do together. All of them call the same collectives in the same order.

    `rank` and `world_size` are those of the group. Tensors are of any shape and layout, on any device, of
    a dtype in `wire.DTYPES`; those that are not contiguous in host memory go through a copy. `reduction` is
    sum, avg, product, min, max, and, or, xor. Everything raises PeerLostError, CollectiveTimeoutError or
    DesyncError, which end the ring on all ranks, and ValueError, before anything moves, for a mistake.
    `sequence` counts collectives.
    """

    def __init__(self, ring: Ring, mesh: Mesh, group: int, topology: Topology, limits: Limits) -> None:
        self.rank = mesh.rank
        self.world_size = mesh.world_size
        self.topology = topology
        self.sequence = 0
        self._ring = ring
        self._mesh = mesh
        self._group = group
        self._limits = limits
        self._others = tuple(mesh.links)
        self._staging = Staging()
        self._choices: dict[tuple[int, torch.dtype, str], tuple[reducing.Algorithm, tuple[int, ...]]] = {}

    # -- reducing ------------------------------------------------------------------------------

    def all_reduce(self, tensor: torch.Tensor, reduction: str = "sum") -> torch.Tensor:
        """Combine `tensor` over all ranks, in place; the same bits on every rank. Returns `tensor`.

        One shape and dtype on all ranks. Halves are combined in float32 in rank order and rounded once.
        """
        if self.world_size == 1:
            return tensor
        flat = self._staging.host(tensor)
        algorithm, fields = self._choices.get((flat.nbytes, flat.dtype, reduction)) or self._choose(flat, reduction)
        self._guard(self._next(fields), algorithm, self._mesh, flat, reduction)
        return self._staging.give(tensor, flat)

    def reduce(self, tensor: torch.Tensor, root: int = 0, reduction: str = "sum") -> torch.Tensor:
        """Combine `tensor` over all ranks into rank `root`'s; the others' stay. Returns `tensor`."""
        combine.check(reduction, tensor.dtype)
        flat = self._staging.host(tensor)
        move = partial(reducing.to_root, self._mesh, flat, root, reduction)
        self._run(Operation.REDUCE, flat.dtype, root, flat.nbytes, move, reduction)
        return self._staging.give(tensor, flat) if self.rank == root else tensor

    def reduce_scatter(
        self, pieces: Sequence[torch.Tensor], reduction: str = "sum", out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Combine everybody's `pieces[rank]` on that rank, and return it there, in `out` if given.

        As many pieces as ranks, of one dtype; sizes may differ from piece to piece, but not from rank to rank.
        """
        self._one_a_rank(pieces)
        dtype = pieces[0].dtype
        combine.check(reduction, dtype)
        flats = self._staging.take(pieces)
        own = flats[self.rank]
        out = torch.empty_like(pieces[self.rank]) if out is None else self._same(out, pieces[self.rank])
        (result,) = self._staging.take([out], read=False)
        result.copy_(own)

        def move(call: bytes, deadline: float) -> None:
            calls = {peer: wire.resized(call, flat.nbytes) for peer, flat in enumerate(flats)}
            reducing.scattered(self._mesh, flats, result, reduction, calls, deadline)

        self._run(Operation.REDUCE_SCATTER, dtype, 0, own.nbytes, move, reduction)
        return self._staging.give(out, result)

    def barrier(self) -> None:
        """Return once every rank has called this."""
        nothing = torch.empty(0, dtype=torch.uint8)
        algorithm = _REDUCERS[self.algorithm("barrier", 0)]
        self._run(Operation.BARRIER, nothing.dtype, 0, 0, partial(algorithm, self._mesh, nothing, "sum"))

    def algorithm(self, operation: str, nbytes: int) -> str:
        """What `algorithms.choose` says for this group."""
        return choose(operation, nbytes, self.world_size, self.topology, self._limits)

    # -- moving --------------------------------------------------------------------------------

    def broadcast(self, tensor: torch.Tensor, root: int = 0) -> torch.Tensor:
        """Overwrite `tensor` on every rank with rank `root`'s, of the same dtype and size. Returns `tensor`."""
        if self.rank == root:
            self._trade(Operation.BROADCAST, root, dict.fromkeys(self._others, tensor), {}, tensor.dtype)
        else:
            self._trade(Operation.BROADCAST, root, {}, {root: tensor}, tensor.dtype)
        return tensor

    def gather(
        self, tensor: torch.Tensor, root: int = 0, out: Sequence[torch.Tensor] | None = None
    ) -> list[torch.Tensor] | None:
        """Every rank's tensor on rank `root`, in rank order; None elsewhere.

        Ranks agree on dtype and all dimensions but the last, which may differ, and be 0. `out`, on the root,
        takes the tensors, whose sizes must be right; without it a tensor has 256 MiB at most.
        """
        if self.rank != root:
            self._trade(Operation.GATHER, root, {root: tensor}, {}, tensor.dtype)
            return None
        return self._collect(Operation.GATHER, root, {}, tensor, out)

    def all_gather(self, tensor: torch.Tensor, out: Sequence[torch.Tensor] | None = None) -> list[torch.Tensor]:
        """Every rank's tensor on every rank, in rank order; sizes and `out` as in `gather`."""
        return self._collect(Operation.ALL_GATHER, 0, dict.fromkeys(self._others, tensor), tensor, out)

    def scatter(self, pieces: Sequence[torch.Tensor] | None, out: torch.Tensor, root: int = 0) -> torch.Tensor:
        """Rank `root`'s `pieces[rank]` in `out` on that rank; the others pass None for pieces. Returns `out`."""
        if self.rank != root:
            self._trade(Operation.SCATTER, root, {}, {root: out}, out.dtype)
            return out
        if pieces is None:
            raise ValueError("the root of a scatter has to give its pieces.")
        self._one_a_rank(pieces)
        self._same(out, pieces[root])
        self._trade(Operation.SCATTER, root, {peer: pieces[peer] for peer in self._others}, {}, pieces[root].dtype)
        return out.copy_(pieces[root])

    def all_to_all(
        self, pieces: Sequence[torch.Tensor], out: Sequence[torch.Tensor] | None = None
    ) -> list[torch.Tensor]:
        """Send `pieces[rank]` to every rank; what they sent to this one, in rank order.

        Ranks agree on dtype and all dimensions but the last; sizes and `out` as in `gather`.
        """
        self._one_a_rank(pieces)
        give = {peer: pieces[peer] for peer in self._others}
        return self._collect(Operation.ALL_TO_ALL, 0, give, pieces[self.rank], out)

    def send(self, tensor: torch.Tensor, to: int, tag: int = 0) -> None:
        """Send `tensor` to rank `to`, whose `recv` names the same tag; returns once it is on its way."""
        self._check_peer(to)
        (flat,) = self._staging.take([tensor])
        call = self._letter(flat, self.rank, tag)
        self._guard(call, letters.post, self._mesh, to, wire.view(flat))

    def recv(self, tensor: torch.Tensor, source: int | None = None, tag: int = 0) -> int:
        """Overwrite `tensor` with what rank `source`, or any, sends with this tag; the rank it came from.

        Letters of one rank with one tag arrive in the order in which they were sent.
        """
        here: list[int] = []
        call, wanted = self._want(tensor, source, tag, lambda: here.append(0))

        def move(call: bytes, deadline: float) -> None:
            letters.want(self._mesh, wanted)
            letters.fetch(self._mesh, wanted, lambda: bool(here), deadline)

        self._guard(call, move)
        return self._received(tensor, wanted)

    def expect(self, tensor: torch.Tensor, source: int | None = None, tag: int = 0) -> Handle[int]:
        """`recv` that waits for its letter beside all that is submitted: what follows it need not wait for it."""
        handle: Handle[int] = Handle()

        def begin() -> None:
            try:
                call, wanted = self._want(
                    tensor, source, tag, lambda: handle.finish(lambda: self._received(tensor, wanted))
                )
                self._guard(call, lambda _, __: letters.want(self._mesh, wanted))
            except BaseException as error:  # noqa: BLE001  it is raised where it is waited for
                handle.fail(error)

        self._ring.expects(handle)
        self._ring.submit(begin)
        return handle

    def broadcast_bytes(self, data: bytes | None, root: int = 0) -> bytes:
        """Rank `root`'s `data` on every rank, 256 MiB at most; the others pass None."""
        if self.rank != root:
            received: list[bytearray] = []
            self._exchange(Operation.BROADCAST_BYTES, torch.uint8, root, {}, {root: _collected(received)}, 0)
            return bytes(received[0])
        if data is None:
            raise ValueError("the root of a broadcast has to give its bytes.")
        give = dict.fromkeys(self._others, memoryview(data))
        self._exchange(Operation.BROADCAST_BYTES, torch.uint8, root, give, {}, _checked_size(len(data)))
        return data

    def gather_bytes(self, data: bytes, root: int = 0) -> list[bytes] | None:
        """Every rank's `data`, 256 MiB at most, on rank `root`, in rank order; None elsewhere."""
        nbytes = _checked_size(len(data))
        if self.rank != root:
            self._exchange(Operation.GATHER_BYTES, torch.uint8, root, {root: memoryview(data)}, {}, nbytes)
            return None
        received: dict[int, list[bytearray]] = {peer: [] for peer in self._others}
        take = {peer: _collected(found) for peer, found in received.items()}
        self._exchange(Operation.GATHER_BYTES, torch.uint8, root, {}, take, nbytes)
        return [data if rank == root else bytes(received[rank][0]) for rank in range(self.world_size)]

    # -- within --------------------------------------------------------------------------------

    def _collect(
        self,
        operation: Operation,
        root: int,
        give: Mapping[int, torch.Tensor],
        own: torch.Tensor,
        out: Sequence[torch.Tensor] | None,
    ) -> list[torch.Tensor]:
        """A tensor from every rank, this one's being `own`: new ones, or in `out`."""
        if out is None:
            found = self._trade(operation, root, give, dict.fromkeys(self._others), own.dtype, own)
            return [own if rank == self.rank else found[rank] for rank in range(self.world_size)]
        self._one_a_rank(out)
        self._same(out[self.rank], own)
        self._trade(operation, root, give, {peer: out[peer] for peer in self._others}, own.dtype)
        out[self.rank].copy_(own)
        return list(out)

    def _trade(
        self,
        operation: Operation,
        root: int,
        give: Mapping[int, torch.Tensor],
        take: Mapping[int, torch.Tensor | None],
        dtype: torch.dtype,
        like: torch.Tensor | None = None,
    ) -> dict[int, torch.Tensor]:
        """Send tensors to ranks and receive others in place of those in `take`, or, where that is None, as
        new ones that differ from `like` in the last dimension at most. Those received."""
        staging = self._staging
        unique = {id(tensor): tensor for tensor in give.values()}
        flats = dict(zip(unique, staging.take(list(unique.values())), strict=True))
        outgoing = {peer: wire.view(flats[id(tensor)]) for peer, tensor in give.items()}
        known = {peer: tensor for peer, tensor in take.items() if tensor is not None}
        if any(tensor.dtype != dtype for tensor in (*unique.values(), *known.values())):
            dtypes = {dtype, *(tensor.dtype for tensor in (*unique.values(), *known.values()))}
            raise ValueError(f"the tensors of a collective have one dtype, not {', '.join(map(str, dtypes))}.")
        landing = dict(zip(known, staging.take(list(known.values()), read=False), strict=True))
        incoming: dict[int, memoryview | Room] = {peer: wire.view(flat) for peer, flat in landing.items()}
        shapes: dict[int, torch.Tensor] = {}
        for peer, tensor in take.items():
            if tensor is None and like is not None:
                for data in outgoing.values():
                    _checked_size(len(data))
                incoming[peer] = partial(_shaped, shapes, peer, like)
        nbytes = max((len(data) for data in (outgoing or incoming).values() if isinstance(data, memoryview)), default=0)
        self._exchange(operation, dtype, root, outgoing, incoming, nbytes)
        for peer, flat in landing.items():
            staging.give(known[peer], flat)
        if like is not None:
            for peer, piece in shapes.items():
                known[peer] = piece.to(like.device)
        return known

    def _exchange(
        self,
        operation: Operation,
        dtype: torch.dtype,
        root: int,
        outgoing: Mapping[int, memoryview],
        incoming: Mapping[int, memoryview | Room],
        nbytes: int,
    ) -> None:
        """One message to each rank of `outgoing`, one from each of `incoming`: all at once."""

        def move(call: bytes, deadline: float) -> None:
            lanes = []
            for peer in self._others:
                out, into = outgoing.get(peer), incoming.get(peer)
                if out is None and into is None:
                    continue
                lane = self._mesh.lane(peer, call)
                if out is not None:
                    lane.send(out, wire.resized(call, len(out)))
                if isinstance(into, memoryview):
                    lane.receive(into, wire.resized(call, len(into)))
                elif into is not None:
                    lane.receive_sized(into)
                lanes.append(lane)
            self._mesh.pump(lanes, deadline)

        self._run(operation, dtype, root, nbytes, move)

    def _run(
        self,
        operation: Operation,
        dtype: torch.dtype,
        root: int,
        nbytes: int,
        move: Callable[[bytes, float], _T],
        reduction: str = "sum",
    ) -> _T | None:
        """The next collective of this group: `move` the bytes, given the call and the deadline."""
        if not 0 <= root < self.world_size:
            raise ValueError(f"root is {root}; the ranks are 0 to {self.world_size - 1}.")
        code = self._code(dtype)
        if self.world_size == 1:
            self._ring.settle_down()
            return None
        return self._guard(self._next((operation, code, wire.REDUCTIONS[reduction], root, nbytes)), move)

    def _next(self, fields: tuple[int, ...]) -> bytes:
        """The call of the next collective, which is about to be made: its operation and what follows that."""
        self._ring.settle_down()
        self.sequence += 1
        return pack_call(self.sequence, self._ring.epoch, self._group, *fields)

    def _guard(self, call: bytes, move: Callable[..., _T], *arguments: object) -> _T:
        """One call, `move` of the arguments, the call and the deadline, whose failure ends the ring."""
        if self._ring.background is None:
            return self._guarded(call, move, *arguments)
        with self._ring.background:
            return self._guarded(call, move, *arguments)

    def _guarded(self, call: bytes, move: Callable[..., _T], *arguments: object) -> _T:
        ring = self._ring
        started = time.perf_counter()
        ring.call = call
        try:
            return move(*arguments, call, started + ring.timeout_s)
        except PeerError as error:
            cause = ring.settle(error)
            if cause is error:
                raise
            raise cause from error
        except BaseException as error:
            ring.abort(last_words(error))
            raise
        finally:
            ring.call = b""
            ring.seconds += time.perf_counter() - started

    def _choose(self, flat: torch.Tensor, reduction: str) -> tuple[reducing.Algorithm, tuple[int, ...]]:
        """The algorithm of an all_reduce and the fields of its call, remembered for the next one of its kind. Raises
        ValueError."""
        combine.check(reduction, flat.dtype)
        if len(self._choices) >= _MAX_CHOICES:
            self._choices.clear()
        fields = (Operation.ALL_REDUCE.value, self._code(flat.dtype), wire.REDUCTIONS[reduction], 0, flat.nbytes)
        found = _REDUCERS[self.algorithm("all_reduce", flat.nbytes)], fields
        self._choices[flat.nbytes, flat.dtype, reduction] = found
        return found

    def _letter(self, flat: torch.Tensor, source: int, tag: int) -> bytes:
        """The call of a letter, which is about to be made."""
        self._ring.settle_down()
        if not 0 <= tag < 1 << 64:
            raise ValueError(f"tag is {tag}; a tag is a number from 0, of 64 bits at most.")
        code = self._code(flat.dtype)
        return pack_call(tag, self._ring.epoch, self._group, Operation.SEND, code, 0, source, flat.nbytes)

    @staticmethod
    def _code(dtype: torch.dtype) -> int:
        code = wire.DTYPES.get(dtype)
        if code is None:
            raise ValueError(f"the ring does not carry {dtype}; it carries {', '.join(map(str, wire.DTYPES))}.")
        return code

    def _want(
        self, tensor: torch.Tensor, source: int | None, tag: int, arrived: Callable[[], None]
    ) -> tuple[bytes, Wanted]:
        """A receive into `tensor`, or into host memory for it, and its call."""
        if source is not None or not self._others:
            self._check_peer(self.rank if source is None else source)
        (flat,) = self._staging.take([tensor], read=False)
        calls = {peer: self._letter(flat, peer, tag) for peer in (self._others if source is None else (source,))}
        return next(iter(calls.values())), Wanted(calls, flat, arrived)

    def _received(self, tensor: torch.Tensor, wanted: Wanted) -> int:
        """The letter in its place; whose it was."""
        self._staging.give(tensor, wanted.flat)
        assert wanted.source is not None
        return wanted.source

    def _check_peer(self, rank: int) -> None:
        if rank not in self._mesh.links:
            raise ValueError(f"rank {self.rank} of {self.world_size} has no peer of rank {rank}.")

    def _one_a_rank(self, pieces: Sequence[torch.Tensor]) -> None:
        if len(pieces) != self.world_size:
            raise ValueError(f"{len(pieces)} tensors for {self.world_size} ranks; give one for each.")

    @staticmethod
    def _same(out: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        if out.shape != own.shape or out.dtype != own.dtype:
            raise ValueError(f"{tuple(own.shape)} of {own.dtype} do not go into {tuple(out.shape)} of {out.dtype}.")
        return out


def _shaped(found: dict[int, torch.Tensor], peer: int, like: torch.Tensor, nbytes: int) -> memoryview:
    """Room for a tensor of `nbytes` that differs from `like` in the last dimension at most."""
    lead = like.shape[:-1] if like.dim() else ()
    row_bytes = like.element_size()
    for length in lead:
        row_bytes *= length
    last, odd = divmod(nbytes, row_bytes) if row_bytes else (0, nbytes)
    if odd or (not like.dim() and last != 1):
        raise ValueError(f"{nbytes:,} bytes are not {tuple(lead)} rows of {like.dtype}")
    found[peer] = torch.empty((*lead, last) if like.dim() else (), dtype=like.dtype)
    return wire.view(found[peer])


def _collected(found: list[bytearray]) -> Room:
    """Room for bytes, which are then in `found`."""

    def room(nbytes: int) -> memoryview:
        found.append(bytearray(nbytes))
        return memoryview(found[-1])

    return room


def _checked_size(nbytes: int) -> int:
    """`nbytes`. Raises ValueError where the other ranks would refuse it."""
    if nbytes > MAX_MESSAGE_BYTES:
        raise ValueError(f"{nbytes:,} bytes in one message; at most {MAX_MESSAGE_BYTES:,} are carried.")
    return nbytes


def last_words(error: BaseException) -> str:
    """Why a rank ends, for the others to read."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted by its user"
    if isinstance(error, SystemExit):
        return f"it exited with status {error.code}"
    return str(error) if isinstance(error, RingLMError) else f"{type(error).__name__}: {error}"

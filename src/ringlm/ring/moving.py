"""Collectives that move tensors and bytes as they are: each message straight from its owner to who needs it.

What it does not know: how bytes go over a link (`lane`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch

from ringlm.ring import wire
from ringlm.ring.calls import Calls
from ringlm.ring.lane import Room
from ringlm.ring.wire import MAX_MESSAGE_BYTES, Operation


class Moving(Calls):
    """Broadcasts, gathers and the like."""

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

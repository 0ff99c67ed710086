"""What the models and the engine ask of the links between ranks. Knows no sockets: a `Communicator` is
whatever has these methods, such as the ring, a torch.distributed group, or threads in a test."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Communicator(Protocol):
    """Collectives between `world_size` ranks; every rank calls the same ones in the same order."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    @property
    def seconds(self) -> float:
        """Time spent in collectives so far."""
        ...

    @property
    def sequence(self) -> int:
        """How many collectives there were, for those who judge whether this rank moves."""
        ...

    @property
    def waiting(self) -> bool:
        """Whether this rank is within a collective."""
        ...

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, in place and returned; the same bits on every rank."""
        ...

    def broadcast_bytes(self, data: bytes | None, root: int = 0) -> bytes:
        """`root`'s bytes on every rank; the others pass None."""
        ...

    def gather_bytes(self, data: bytes, root: int = 0) -> list[bytes] | None:
        """Every rank's bytes in rank order on `root`, None elsewhere."""
        ...

    def gather(self, tensor: Tensor, root: int = 0) -> list[Tensor] | None:
        """Every rank's contiguous 2-D tensor in rank order on `root`, None elsewhere.

        One dtype and one dim 0 for all; dim 1 may differ from rank to rank.
        """
        ...

    def close(self) -> None:
        """Release what the ranks share; a second call does nothing."""
        ...


class Relinked:
    """Another Communicator, which may be replaced by one of the same rank and world size: what a model holds, that
    outlives the ring it was loaded for. Its methods are the other's own, so they cost nothing more."""

    def __init__(self, comm: Communicator) -> None:
        self.relink(comm)

    def relink(self, comm: Communicator) -> None:
        """Be `comm` from here on."""
        self._comm = comm
        self.rank, self.world_size = comm.rank, comm.world_size
        self.all_reduce, self.broadcast_bytes = comm.all_reduce, comm.broadcast_bytes
        self.gather_bytes, self.gather, self.close = comm.gather_bytes, comm.gather, comm.close

    @property
    def seconds(self) -> float:
        return self._comm.seconds

    @property
    def sequence(self) -> int:
        return self._comm.sequence

    @property
    def waiting(self) -> bool:
        return self._comm.waiting


class Alone:
    """The Communicator of a world of one: every collective is the identity, without a copy."""

    rank = 0
    world_size = 1
    seconds = 0.0
    sequence = 0
    waiting = False

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor

    def broadcast_bytes(self, data: bytes | None, root: int = 0) -> bytes:
        if data is None:
            raise ValueError("the root of a broadcast has to give its bytes")
        return data

    def gather_bytes(self, data: bytes, root: int = 0) -> list[bytes] | None:
        return [data]

    def gather(self, tensor: Tensor, root: int = 0) -> list[Tensor] | None:
        return [tensor]

    def close(self) -> None:
        pass

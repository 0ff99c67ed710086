"""The calls of a group of ranks, one after another: their numbers, their deadlines, what becomes of one that fails.

What it does not know: what a call moves, and where to.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch

from ringlm.errors import PeerError, RingLMError
from ringlm.ring import wire
from ringlm.ring.devices import Staging
from ringlm.ring.mesh import Mesh
from ringlm.ring.wire import Operation, pack_call

if TYPE_CHECKING:
    from ringlm.ring.ring import Ring

_T = TypeVar("_T")


class Calls:
    """What the ranks of a group call together. `rank` and `world_size` are those of the group, `sequence` counts
    collectives."""

    def __init__(self, ring: Ring, mesh: Mesh, group: int) -> None:
        self.rank = mesh.rank
        self.world_size = mesh.world_size
        self.sequence = 0
        self._ring = ring
        self._mesh = mesh
        self._group = group
        self._others = tuple(mesh.links)
        self._staging = Staging()

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

    @staticmethod
    def _code(dtype: torch.dtype) -> int:
        code = wire.DTYPES.get(dtype)
        if code is None:
            raise ValueError(f"the ring does not carry {dtype}; it carries {', '.join(map(str, wire.DTYPES))}.")
        return code

    def _one_a_rank(self, pieces: Sequence[torch.Tensor]) -> None:
        if len(pieces) != self.world_size:
            raise ValueError(f"{len(pieces)} tensors for {self.world_size} ranks; give one for each.")

    @staticmethod
    def _same(out: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        if out.shape != own.shape or out.dtype != own.dtype:
            raise ValueError(f"{tuple(own.shape)} of {own.dtype} do not go into {tuple(out.shape)} of {out.dtype}.")
        return out


def last_words(error: BaseException) -> str:
    """Why a rank ends, for the others to read."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted by its user"
    if isinstance(error, SystemExit):
        return f"it exited with status {error.code}"
    return str(error) if isinstance(error, RingLMError) else f"{type(error).__name__}: {error}"

"""torch.distributed's Work and futures, about what the ring does. Knows no operation."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.distributed import Work
from torch.futures import Future

from ringlm.errors import PeerError
from ringlm.ring.background import Handle


class RingWork(Work):
    """An operation on `tensors`, which `handle` is about; None: it is done.

    `late` makes the error of a wait with no limit of its own that took longer than `timeout_s`, and ends the group.
    Errors pass through the context `named`.
    """

    def __init__(
        self,
        tensors: list[torch.Tensor],
        handle: Handle[Any] | None = None,
        timeout_s: float | None = None,
        late: Callable[[], Exception] | None = None,
        named: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        super().__init__()
        self._tensors = tensors
        self._handle = handle
        self._timeout_s = timeout_s
        self._late = late
        self._named = named
        self._future: Future[list[torch.Tensor]] | None = None

    def wait(self, timeout: datetime.timedelta | None = None) -> bool:
        """Until it is done; raises what it met, or TimeoutError, and it goes on, after `timeout` (0: none)."""
        if self._handle is None:
            return True
        limit = timeout.total_seconds() if timeout else 0.0
        with self._named():
            try:
                self._handle.wait(limit if limit > 0 else self._timeout_s)
            except TimeoutError:
                if limit > 0 or self._late is None:
                    raise
                raise self._late() from None
        return True

    def synchronize(self) -> None:
        self.wait()

    def block_current_stream(self) -> None:
        self.wait()

    def is_completed(self) -> bool:
        return self._handle is None or self._handle.done()

    def is_success(self) -> bool:
        return self.is_completed() and self.exception() is None

    def exception(self) -> BaseException | None:
        return None if self._handle is None else self._handle.error()

    def result(self) -> list[torch.Tensor]:
        """The tensors that it has filled. Waits."""
        self.wait()
        return self._tensors

    def source_rank(self) -> int:
        """Whose letter a receive has brought, by its rank in the group. Waits."""
        self.wait()
        assert self._handle is not None
        return int(self._handle.wait())

    _source_rank = source_rank

    def get_future(self) -> Future[list[torch.Tensor]]:
        """Of the tensors. DistributedDataParallel waits for it in C++."""
        if self._future is None:
            root: Future[list[torch.Tensor]] = Future(
                devices=list({tensor.device for tensor in self._tensors if tensor.is_cuda})
            )
            # An error set from Python would be a value to C++; one that a callback raises is an error there, too.
            self._future = root.then(lambda _: self.result())
            if self._handle is None:
                root.set_result(self._tensors)
            else:
                self._handle.then(lambda: root.set_result(self._tensors))
        return self._future


@contextlib.contextmanager
def renamed(ranks: Sequence[int]) -> Iterator[None]:
    """A context whose errors number ranks as all know them; `ranks` are those of the group."""
    try:
        yield
    except PeerError as error:
        rank = ranks[error.rank]
        if rank == error.rank:
            raise
        raise type(error)(
            f"{error} In this group of ranks {list(ranks)} rank {error.rank} is rank {rank} of all.", rank
        ) from error

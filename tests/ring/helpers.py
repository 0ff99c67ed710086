"""Rings for tests: of threads, in this process, and of processes that a test can kill. All with deadlines."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from ringlm.cluster.local import free_ports
from ringlm.ring import Heartbeat, Ring, RingConfig, connect
from ringlm.ring.address import Address
from tests.processes import DEADLINE_S, Processes


def configs(world_size: int, **changes: Any) -> list[RingConfig]:
    """The configurations, by rank, of a ring over loopback."""
    ports = free_ports(world_size)
    fields: dict[str, Any] = {"connect_timeout_s": DEADLINE_S, "timeout_s": DEADLINE_S, **changes}
    return [
        RingConfig(
            rank=rank,
            world_size=world_size,
            port=ports[rank],
            right=Address("127.0.0.1", ports[(rank + 1) % world_size]) if world_size > 1 else None,
            **fields,
        )
        for rank in range(world_size)
    ]


# -- threads -----------------------------------------------------------------------------------


def attempt(*calls: Callable[[], Any], deadline_s: float = DEADLINE_S) -> list[Any]:
    """Each call on a thread of its own; what it returned, or the exception that it raised."""
    outcomes: list[Any] = [TimeoutError("it still runs")] * len(calls)

    def go(index: int) -> None:
        try:
            outcomes[index] = calls[index]()
        except BaseException as error:  # noqa: BLE001  it is the outcome
            outcomes[index] = error

    threads = [threading.Thread(target=go, args=(index,), daemon=True) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    stop = time.monotonic() + deadline_s
    for thread in threads:
        thread.join(max(0.0, stop - time.monotonic()))
    return list(outcomes)


def together(*calls: Callable[[], Any], deadline_s: float = DEADLINE_S) -> list[Any]:
    """Like `attempt`; raises the first exception."""
    outcomes = attempt(*calls, deadline_s=deadline_s)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return outcomes


def each(rings: list[Ring], work: Callable[[Ring], Any]) -> list[Any]:
    """`work` on every rank at once; the results by rank."""
    return together(*(lambda ring=ring: work(ring) for ring in rings))


@contextlib.contextmanager
def thread_ring(world_size: int, *, options: dict[str, Any] | None = None, **changes: Any) -> Iterator[list[Ring]]:
    """A ring of threads; `options` go to connect."""
    rings = together(
        *(lambda config=config: connect(config, **(options or {})) for config in configs(world_size, **changes))
    )
    try:
        yield rings
    finally:
        for ring in rings:
            ring.close()


# -- processes ---------------------------------------------------------------------------------


class ProcessRing(Processes):
    """A ring of processes. `heartbeat` is (interval_s, silence_s, stall_s); `options` go to connect."""

    def __init__(
        self,
        world_size: int,
        *,
        heartbeat: tuple[float, float, float] | None = None,
        options: Any = None,
        **changes: Any,
    ) -> None:
        super().__init__(
            [partial(_connected, config, heartbeat, options or {}) for config in configs(world_size, **changes)]
        )


def _connected(config: RingConfig, heartbeat: tuple[float, float, float] | None, options: Any) -> Ring:
    beat = None
    if heartbeat is not None:
        interval_s, silence_s, stall_s = heartbeat
        beat = Heartbeat(interval_s=interval_s, silence_s=silence_s, stall_s=stall_s)
    return connect(config, heartbeat=beat, **options)


# -- sums --------------------------------------------------------------------------------------

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.int64, torch.uint8)


def contribution(seed: int, rank: int, length: int, dtype: torch.dtype) -> torch.Tensor:
    """What `rank` brings to a sum: all sizes of numbers, so that the order of additions shows."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    if not dtype.is_floating_point:
        return torch.randint(0, 200, (length,), generator=generator).to(dtype)
    exponents = torch.randint(-3, 4, (length,), generator=generator).double()
    return (torch.randn(length, generator=generator).double() * 10**exponents).to(dtype)


def expected_sum(seed: int, world_size: int, length: int, dtype: torch.dtype) -> torch.Tensor:
    """The contributions added in rank order, halves in float32, rounded once."""
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    total = contribution(seed, 0, length, dtype).to(wide)
    for rank in range(1, world_size):
        total = total + contribution(seed, rank, length, dtype).to(wide)
    return total.to(dtype)

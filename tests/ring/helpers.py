"""Rings for tests: of threads, in this process, and of processes that a test can kill. All with deadlines."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch

from ringlm.errors import RingLMError
from ringlm.ring import Heartbeat, Ring, RingConfig, connect
from ringlm.ring.address import Address

DEADLINE_S = 20.0
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["tests.ring.helpers"])


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, outside the range from which the kernel picks."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as probe:
            if port not in ports and probe.connect_ex(("127.0.0.1", port)):
                ports.append(port)
    return ports


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


class Failure(NamedTuple):
    """An exception that a rank's process met."""

    kind: str
    rank: int | None
    text: str
    after_s: float


class ProcessRing:
    """A ring of processes that do as they are told, one call each at a time.

    `heartbeat` is (interval_s, silence_s, stall_s). A call is a function of tests, of a Ring and more.
    """

    def __init__(
        self,
        world_size: int,
        *,
        heartbeat: tuple[float, float, float] | None = None,
        options: Any = None,
        **changes: Any,
    ) -> None:
        self._pipes: list[Connection] = []
        self.processes = []
        for config in configs(world_size, **changes):
            ours, theirs = _FORKS.Pipe()
            process = _FORKS.Process(target=_rank, args=(config, heartbeat, options or {}, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self.processes.append(process)
        for rank in range(world_size):
            assert self.result(rank) == "ready"

    def start(self, rank: int, function: Callable[..., Any], *arguments: Any) -> None:
        self._pipes[rank].send((function, arguments))

    def result(self, rank: int, deadline_s: float = DEADLINE_S) -> Any:
        """What the last call on `rank` returned, or a Failure."""
        if not self._pipes[rank].poll(deadline_s):
            raise TimeoutError(f"rank {rank} still runs")
        return self._pipes[rank].recv()

    def call(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """`function(ring, *arguments)` on every rank; the results by rank."""
        for rank in range(len(self._pipes)):
            self.start(rank, function, *arguments)
        return [self.result(rank) for rank in range(len(self._pipes))]

    def signal(self, rank: int, number: int) -> None:
        os.kill(self.processes[rank].pid, number)

    def close(self) -> None:
        for process, pipe in zip(self.processes, self._pipes, strict=True):
            pipe.close()
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGCONT)
        for process in self.processes:
            process.join(5.0)
            process.kill()
            process.join(5.0)

    def __enter__(self) -> ProcessRing:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _rank(config: RingConfig, heartbeat: tuple[float, float, float] | None, options: Any, pipe: Connection) -> None:
    torch.set_num_threads(1)
    beat = None
    if heartbeat is not None:
        interval_s, silence_s, stall_s = heartbeat
        beat = Heartbeat(interval_s=interval_s, silence_s=silence_s, stall_s=stall_s)
    with connect(config, heartbeat=beat, **options) as ring:
        pipe.send("ready")
        while True:
            try:
                function, arguments = pipe.recv()
            except EOFError:
                return
            started = time.monotonic()
            try:
                outcome = function(ring, *arguments)
            except (RingLMError, ValueError) as error:
                outcome = Failure(
                    type(error).__name__, getattr(error, "rank", None), str(error), time.monotonic() - started
                )
            pipe.send(outcome)


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

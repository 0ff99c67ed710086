"""All-reduce by size, world size and backend: starts the ranks, says who calls what, and makes rows of the times.

Every world size has processes of its own (comm_rank.py), all alive together. Blocks of calls alternate between
backends, sizes and world sizes, so that all see the same weather. No torch here.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Final, NoReturn, TypedDict

import msgspec

from ringlm.cluster.channel import Channel, ChannelClosed
from ringlm.cluster.local import local_ring
from ringlm.cluster.order import end, how_ended
from ringlm.errors import ConfigError, RingError
from ringlm.ring.config import MAX_WORLD_SIZE, RingConfig

DTYPES: Final = {"float32": 4, "bfloat16": 2, "float16": 2}
AGAINST: Final = ("gloo", "nccl")
DEVICES: Final = ("cpu", "cuda")

_ROUNDS = 10  # blocks of each row
_TRIAL = 5  # calls that say how many a block may have
_MOST = 2000  # calls of a block
_START_S = 180.0
_BLOCK_S = 120.0
_END_S = 5.0


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What to measure: tensors of `sizes` bytes between `world_sizes` ranks, for roughly `seconds` a row. `against`
    names what the ring is compared to, if anything.

    Raises ConfigError for what cannot be measured.
    """

    sizes: tuple[int, ...]
    world_sizes: tuple[int, ...]
    dtype: str = "float32"
    device: str = "cpu"
    against: str | None = None
    seconds: float = 1.0

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"--dtype {self.dtype} is not known; choose {', '.join(DTYPES)}.")
        if self.device not in DEVICES:
            raise ConfigError(f"--device {self.device} is not known; choose {' or '.join(DEVICES)}.")
        if self.against not in (None, *AGAINST):
            raise ConfigError(f"--against {self.against} is not known; choose {' or '.join(AGAINST)}.")
        if self.against == "nccl" and self.device != "cuda":
            raise ConfigError("--against nccl needs --device cuda; leave --device out.")
        for size in self.sizes:
            if size < 1 or size % DTYPES[self.dtype]:
                raise ConfigError(
                    f"--sizes holds {size}; {self.dtype} takes {DTYPES[self.dtype]} bytes, so give a multiple of that."
                )
        for world_size in self.world_sizes:
            if not 2 <= world_size <= MAX_WORLD_SIZE:
                raise ConfigError(f"--world-size is {world_size}; give 2 to {MAX_WORLD_SIZE} ranks.")
        if not 0 < self.seconds < _BLOCK_S:
            raise ConfigError(f"--seconds is {self.seconds:g}; give more than 0 and less than {_BLOCK_S:g}.")

    @property
    def backends(self) -> tuple[str, ...]:
        return ("ring",) if self.against is None else ("ring", self.against)

    @property
    def blocks(self) -> int:
        """How many blocks of calls all of it takes."""
        return (_ROUNDS + 1) * len(self.world_sizes) * len(self.sizes) * len(self.backends)


class Row(TypedDict):
    """All-reduce of `bytes` between `world_size` ranks: quantiles of rank 0's calls, `bytes` over the median, and,
    for the ring, which of its algorithms carried it."""

    backend: str
    world_size: int
    dtype: str
    bytes: int
    us_p50: float
    us_p90: float
    us_p99: float
    gb_per_s: float
    algorithm: str


class Start(msgspec.Struct, frozen=True, tag=True):
    """To a rank, first of all: who it is and what it will be asked for."""

    ring: RingConfig
    plan: Plan


class Block(msgspec.Struct, frozen=True, tag=True):
    """To every rank of a ring: make `count` calls, after one that is not counted."""

    backend: str
    nbytes: int
    count: int


class Began(msgspec.Struct, frozen=True, tag=True):
    """From a rank: its groups are formed. `algorithms` are the ring's, by size."""

    algorithms: dict[int, str]


class Times(msgspec.Struct, frozen=True, tag=True):
    """From a rank: seconds of each call of a block."""

    seconds: list[float]


class Failure(msgspec.Struct, frozen=True, tag=True):
    """From a rank, last of all: why it ends; `mistake` if that is its user's to mend."""

    message: str
    mistake: bool


ToRank = Start | Block
FromRank = Began | Times | Failure


def measure(plan: Plan, advance: Callable[[], None] = lambda: None) -> list[Row]:
    """The rows of `plan`; `advance` is called after each of its blocks. No process is left when this ends, however.

    Raises ConfigError and RingError.
    """
    with contextlib.ExitStack() as stack:
        rings = [stack.enter_context(_Ranks(world_size, plan)) for world_size in plan.world_sizes]
        algorithms = [ranks.begin() for ranks in rings]
        cases = list(itertools.product(range(len(rings)), plan.sizes, plan.backends))
        counts: dict[tuple[int, int, str], int] = {}
        for case in cases:
            trial = statistics.median(_calls(rings, case, _TRIAL))
            counts[case] = min(_MOST, max(3, int(plan.seconds / _ROUNDS / trial)))
            advance()
        times: dict[tuple[int, int, str], list[float]] = {case: [] for case in cases}
        for _, case in itertools.product(range(_ROUNDS), cases):
            times[case] += _calls(rings, case, counts[case])
            advance()
    return [
        _row(plan, case, plan.world_sizes[case[0]], sorted(found), algorithms[case[0]]) for case, found in times.items()
    ]


def _calls(rings: list[_Ranks], case: tuple[int, int, str], count: int) -> list[float]:
    number, nbytes, backend = case
    return rings[number].block(Block(backend, nbytes, count))


def _row(
    plan: Plan, case: tuple[int, int, str], world_size: int, times: list[float], algorithms: dict[int, str]
) -> Row:
    _, nbytes, backend = case
    p50, p90, p99 = (times[int(len(times) * share)] for share in (0.5, 0.9, 0.99))
    return Row(
        backend=backend,
        world_size=world_size,
        dtype=plan.dtype,
        bytes=nbytes,
        us_p50=round(p50 * 1e6, 2),
        us_p90=round(p90 * 1e6, 2),
        us_p99=round(p99 * 1e6, 2),
        gb_per_s=round(nbytes / p50 / 1e9, 6),
        algorithm=algorithms[nbytes] if backend == "ring" else backend,
    )


class _Ranks:
    """The processes of one world size, which end with this, or with this process."""

    def __init__(self, world_size: int, plan: Plan) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        self._channels: list[Channel[FromRank]] = []
        self._sockets: list[socket.socket] = []
        try:
            for ring in local_ring(world_size):
                self._start(Start(ring, plan))
        except BaseException as error:
            self._end()
            if isinstance(error, OSError):
                raise RingError(f"a rank could not be started: {error}.") from error
            raise

    def begin(self) -> dict[int, str]:
        """Wait until every rank has formed its groups; the ring's algorithms by size."""
        began = self._answers(_START_S)
        assert isinstance(began, Began)
        return began.algorithms

    def block(self, block: Block) -> list[float]:
        """Have every rank make the calls; rank 0's times in seconds."""
        for rank, channel in enumerate(self._channels):
            try:
                channel.send(block)
            except ChannelClosed:
                self._receive(rank, _END_S)  # its last words
        times = self._answers(_BLOCK_S)
        assert isinstance(times, Times)
        return times.seconds

    def __enter__(self) -> _Ranks:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._end(at_once=error is not None)

    def _start(self, start: Start) -> None:
        ours, theirs = socket.socketpair()
        self._sockets.append(ours)
        self._channels.append(Channel(ours, FromRank))
        with theirs:
            # A session of its own: Ctrl-C is for this process, whose end closes the channel. One thread a rank,
            # and the ring alone on stdout.
            process = subprocess.Popen(
                [sys.executable, "-m", "ringlm.cluster.comm_rank", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=2,
                start_new_session=True,
            )
        self._processes.append(process)
        self._channels[-1].send(start)

    def _answers(self, timeout_s: float) -> Began | Times:
        """One message from every rank, in any order, since one that has failed keeps others waiting; rank 0's."""
        deadline = time.monotonic() + timeout_s
        answers: dict[int, Began | Times] = {}
        while waiting := [sock for rank, sock in enumerate(self._sockets) if rank not in answers]:
            found = select.select(waiting, [], [], max(0.0, deadline - time.monotonic()))[0] or waiting[:1]
            for sock in found:
                rank = self._sockets.index(sock)
                answers[rank] = self._receive(rank, max(0.0, deadline - time.monotonic()))
        return answers[0]

    def _receive(self, rank: int, timeout_s: float) -> Began | Times:
        try:
            message = self._channels[rank].receive(timeout_s)
        except ChannelClosed:
            self._lost(rank)
        if message is None:
            raise RingError(f"rank {rank} of {len(self._channels)} is too slow, or stopped: it did not answer in time.")
        if isinstance(message, Failure):
            raise (ConfigError if message.mistake else RingError)(message.message)
        return message

    def _lost(self, rank: int) -> NoReturn:
        try:
            status = self._processes[rank].wait(_END_S)
        except subprocess.TimeoutExpired:
            status = 0
        raise RingError(
            f"rank {rank} of {len(self._channels)} {how_ended(status)} without a word; was there memory enough?"
        )

    def _end(self, at_once: bool = True) -> None:
        for channel in self._channels:
            channel.close()
        deadline = time.monotonic() + (0.0 if at_once else _END_S)
        for process in self._processes:
            end(process, deadline - time.monotonic(), _END_S)

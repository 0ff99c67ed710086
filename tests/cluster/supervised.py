"""A ring behind cables, with a supervisor that starts again what ends, and that knows all its processes."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from ringlm.cluster.client import EngineClient
from ringlm.cluster.messages import Progress
from ringlm.cluster.settings import Settings
from ringlm.errors import RingLMError
from tests.cables import Cables, Relay
from tests.cluster.rings import new_ring

SETTINGS = Settings(dtype="float32", context=1024)
REJOIN_S = 100.0  # less than the runs' patience, so that who does not come back is missed
_QUIET_S = 2.0  # longer than a rank takes that leaves once it is idle
_LOOK_S = 0.1
_MARK = "RINGLM_TEST_RING"


class Wrong(Exception):
    """What should not have happened in a run."""


class Supervised:
    """A ring of processes; with `recovery` daemons that end are started again, without it only until it is ready."""

    def __init__(self, model: str, world_size: int, folder: Path, cables: Cables, *, recovery: bool) -> None:
        self.world_size = world_size
        self.recovery = recovery
        self._cables = cables
        self._mark = f"{_MARK}={uuid.uuid4().hex}"
        self._ring = new_ring(
            model,
            world_size,
            folder,
            settings=SETTINGS,
            cables=cables,
            rejoin_timeout_s=REJOIN_S if recovery else 0.0,
            environment=dict([self._mark.split("=")]),
        )
        self._supervising = threading.Event()
        self._closed = threading.Event()
        self._lock = threading.Lock()  # on the list of daemons
        threading.Thread(target=self._supervise, name="supervisor", daemon=True).start()

    @property
    def client(self) -> EngineClient:
        return self._ring.client

    def said(self) -> str:
        return self._ring.said()

    def start(
        self,
        limit_s: float,
        when_connecting: Callable[[], None] | None = None,
        when_loading: Callable[[], None] | None = None,
    ) -> int:
        """All ranks, until they are ready; how often rank 0 had to be started. Each `when` is called once somebody
        has dialled a rank, and once rank 0 loads. Raises Wrong after `limit_s`."""
        self._cables.used.clear()
        self._ring.daemons += [self._ring.daemon(engine) for engine in self._ring.specs[1:]]
        if when_connecting is not None:
            threading.Thread(target=lambda: self._cables.used.wait(limit_s) and when_connecting(), daemon=True).start()

        def on_progress(progress: Progress) -> None:
            if progress.stage == "load" and when_loading is not None:
                when_loading()

        return self.restart_first(limit_s, on_progress)

    def restart_first(self, limit_s: float, on_progress: Callable[[Progress], None] | None = None) -> int:
        """Rank 0, until the ring is ready; how often it had to be started. Raises Wrong after `limit_s`."""
        if hasattr(self._ring, "client"):
            self._ring.client.close()
        self._supervising.set()
        deadline, why = time.monotonic() + limit_s, "nothing"
        watchdog = threading.Timer(limit_s, lambda: self.signal(0, signal.SIGKILL))
        watchdog.start()
        try:
            for tries in itertools.count(1):
                try:
                    self._ring.start_first(on_progress)
                    if not self.recovery:
                        self._supervising.clear()
                    return tries
                except RingLMError as error:
                    why = f"{type(error).__name__}: {error}"
                if time.monotonic() > deadline:
                    raise Wrong(f"no ring after {limit_s:g} s and {tries} starts of rank 0; the last said {why}")
                time.sleep(_LOOK_S)
        finally:
            watchdog.cancel()
        raise AssertionError

    def ways(self, rank: int, other: int | None) -> list[Relay]:
        """All relays between `rank` and `other`, or everybody."""
        pairs = [pair for pair in self._ring.relays if rank in pair and (other is None or other in pair)]
        return [self._ring.relays[pair] for pair in pairs]

    def pid(self, rank: int) -> int:
        """Of the process of `rank`; 0 where there is none."""
        with self._lock:
            daemons = [daemon.process.pid for daemon in self._ring.daemons]
        if rank:
            return daemons[rank - 1]
        return max((pid for pid in self.pids() if pid not in daemons), default=0)

    def pids(self) -> list[int]:
        """Of every process that has come of this ring and is there still."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended
                if self._mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
        return found

    def signal(self, rank: int, number: int) -> None:
        if pid := self.pid(rank):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def go_on(self, pid: int) -> None:
        """SIGCONT, if that process is there still."""
        if pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def still_there(self, limit_s: float) -> list[int]:
        """The daemons, by rank, that have not ended after `limit_s`."""
        deadline = time.monotonic() + limit_s
        while left := [rank for rank, daemon in enumerate(self._ring.daemons, 1) if daemon.process.poll() is None]:
            if time.monotonic() > deadline:
                break
            time.sleep(_LOOK_S)
        return left

    def close(self, *, orderly: bool, limit_s: float) -> None:
        """End all. Where that can be done in order, raises Wrong if a process is left."""
        left: list[int] = []
        try:
            if orderly:
                self._settle(limit_s)
            self._supervising.clear()
            if orderly:
                self.client.close()
                left = self.still_there(limit_s)
        finally:
            self._supervising.clear()
            self._closed.set()
            with self._lock:
                self._ring.close()
        if left or self.pids():
            raise Wrong(f"left at the end: ranks {left}, processes {self.pids()}")

    def _settle(self, limit_s: float) -> None:
        """Wait until nobody has been lost for a while."""
        deadline = time.monotonic() + limit_s
        quiet = time.monotonic()
        while time.monotonic() - quiet < _QUIET_S:
            self.client.next_event(_LOOK_S)
            if self.client.recovering is not None or self._ended():
                quiet = time.monotonic()
            if quiet > deadline:
                raise Wrong(f"the ring is not formed again within {limit_s:g} s: {self.client.recovering}")

    def _ended(self) -> list[int]:
        return [rank for rank, daemon in enumerate(self._ring.daemons, 1) if daemon.process.poll() is not None]

    def _supervise(self) -> None:
        while not self._closed.wait(_LOOK_S):
            with self._lock:
                for rank in self._ended() if self._supervising.is_set() else ():
                    self._ring.daemons[rank - 1] = self._ring.daemon(self._ring.specs[rank])

"""Rings of real processes, wired as in two terminals, or with a relay between any two of them."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from unittest import mock

from ringlm.cluster import spec
from ringlm.cluster.client import EngineClient
from ringlm.cluster.local import local_ring
from ringlm.cluster.messages import Progress
from ringlm.cluster.settings import Settings
from ringlm.cluster.spec import EngineSpec
from tests.cables import Cables, Relay

CABLED = Path(__file__).parents[1] / "cabled"


class Daemon:
    """A rank other than 0 in a process of its own; what it says on stderr is kept."""

    def __init__(self, engine: EngineSpec, log: Path, environment: Mapping[str, str]) -> None:
        arguments, fd = spec.command(engine)
        self.log = log
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(
                arguments, pass_fds=(fd,), stdin=subprocess.DEVNULL, stderr=stderr, env=os.environ | environment
            )
        os.close(fd)

    def said(self) -> str:
        return self.log.read_text()

    def kill(self) -> None:
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait(90)


class ProcessRing:
    """A ring: `client` is rank 0's, `daemons` are the others by rank - 1; `specs` is what each was given, `environment`
    what all were, and `relays` those between them, by who dials whom."""

    def __init__(
        self,
        specs: list[EngineSpec],
        tmp_path: Path,
        relays: Mapping[tuple[int, int], Relay],
        environment: Mapping[str, str],
    ) -> None:
        self.specs = specs
        self.relays = relays
        self._shared = environment
        self._tmp_path = tmp_path
        self._started: list[Daemon] = []
        self.daemons: list[Daemon] = []
        self.client: EngineClient

    def start(self) -> None:
        """All ranks; returns once they are ready."""
        self.daemons += [self.daemon(engine) for engine in self.specs[1:]]
        self.start_first()

    def start_first(self, on_progress: Callable[[Progress], None] | None = None) -> None:
        """Rank 0; returns once all ranks are ready."""
        with mock.patch.dict(os.environ, self._environment(self.specs[0])):
            self.client = EngineClient.start(self.specs[0], on_progress)

    def daemon(self, engine: EngineSpec) -> Daemon:
        """One more process of the ring, that ends with it."""
        daemon = Daemon(engine, self._tmp_path / f"daemon{len(self._started)}.log", self._environment(engine))
        self._started.append(daemon)
        return daemon

    def said(self) -> str:
        """What all daemons said, also those that have ended."""
        return "\n".join(f"{daemon.log.name}: {daemon.said()}" for daemon in self._started)

    def pid(self, rank: int) -> int:
        """Of the engine process of `rank`."""
        return self.client._processes[0].pid if rank == 0 else self.daemons[rank - 1].process.pid

    def _environment(self, engine: EngineSpec) -> dict[str, str]:
        """With what makes that rank dial the others through their relays."""
        own = None if engine.ring is None else engine.ring.rank
        ways = [f"{_port(self.specs[to])}:{relay.port}" for (by, to), relay in self.relays.items() if by == own]
        cabled = (
            {"PYTHONPATH": f"{CABLED}:{os.environ.get('PYTHONPATH', '')}", "RINGLM_TEST_RELAYS": ",".join(ways)}
            if ways
            else {}
        )
        return {**self._shared, **cabled}

    def close(self) -> None:
        """End all."""
        if hasattr(self, "client"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.client._processes[0].pid, signal.SIGCONT)
            self.client.close()
        for daemon in self._started:
            daemon.kill()


def _port(engine: EngineSpec) -> int:
    assert engine.ring is not None
    return engine.ring.port


def new_ring(
    model: str,
    world_size: int,
    tmp_path: Path,
    *,
    settings: Settings,
    cables: Cables | None = None,
    rejoin_timeout_s: float = 0.0,
    environment: Mapping[str, str] | None = None,
) -> ProcessRing:
    """A ring that is yet to be started. With `cables` there is a relay for everybody who dials somebody."""
    specs = [
        EngineSpec(model=model, settings=settings, ring=ring, threads=1, rejoin_timeout_s=rejoin_timeout_s)
        for ring in local_ring(world_size)
    ]
    pairs = itertools.permutations(range(world_size), 2) if cables is not None else ()
    relays = {(by, to): cables.relay(_port(specs[to])) for by, to in pairs if cables}
    return ProcessRing(specs, tmp_path, relays, environment or {})


@contextlib.contextmanager
def process_ring(
    model: str,
    world_size: int,
    tmp_path: Path,
    *,
    settings: Settings,
    cables: Cables | None = None,
    rejoin_timeout_s: float = 0.0,
) -> Iterator[ProcessRing]:
    """A ring of processes, as `new_ring` makes it; all are ended at the end."""
    ring = new_ring(model, world_size, tmp_path, settings=settings, cables=cables, rejoin_timeout_s=rejoin_timeout_s)
    try:
        ring.start()
        yield ring
    finally:
        ring.close()

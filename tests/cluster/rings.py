"""Rings of real processes, wired as in two terminals, and a relay that cuts or freezes a link."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from ringlm.cluster import spec
from ringlm.cluster.client import EngineClient
from ringlm.cluster.local import local_ring
from ringlm.cluster.settings import Settings
from ringlm.cluster.spec import EngineSpec
from ringlm.ring.address import Address


class Relay:
    """Forwards TCP connections to `port` until it is cut (both ends closed) or frozen (bytes stay away)."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        self._sockets: list[socket.socket] = []
        self._frozen = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Close every connection, and take no more."""
        self._listening.close()
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def freeze(self) -> None:
        """Let nothing through any more, and tell nobody."""
        self._frozen.set()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listening.accept()
                try:
                    far = socket.create_connection(("127.0.0.1", self._target), 5.0)
                except OSError:
                    near.close()  # nobody there yet; the dialler tries again
                    continue
                self._sockets += [near, far]
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._forward, args=(source, sink), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                while self._frozen.is_set():
                    time.sleep(0.05)
                sink.sendall(data)
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


class Daemon:
    """A rank other than 0 in a process of its own; what it says on stderr is kept."""

    def __init__(self, engine: EngineSpec, log: Path) -> None:
        arguments, fd = spec.command(engine)
        self.log = log
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(arguments, pass_fds=(fd,), stdin=subprocess.DEVNULL, stderr=stderr)
        os.close(fd)

    def said(self) -> str:
        return self.log.read_text()

    def kill(self) -> None:
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait(10)


class ProcessRing:
    """A started ring: `client` is rank 0's, `daemons` are the others by rank - 1; `specs` is what each was given."""

    def __init__(self, specs: list[EngineSpec], tmp_path: Path) -> None:
        self.specs = specs
        self._tmp_path = tmp_path
        self._started: list[Daemon] = []
        self.daemons: list[Daemon] = []
        self.client: EngineClient

    def start(self) -> None:
        """All ranks; returns once they are ready."""
        self.daemons += [self.daemon(engine) for engine in self.specs[1:]]
        self.client = EngineClient.start(self.specs[0])

    def daemon(self, engine: EngineSpec) -> Daemon:
        """One more process of the ring, that ends with it."""
        daemon = Daemon(engine, self._tmp_path / f"daemon{len(self._started)}.log")
        self._started.append(daemon)
        return daemon

    def said(self) -> str:
        """What all daemons said, also those that have ended."""
        return "\n".join(f"{daemon.log.name}: {daemon.said()}" for daemon in self._started)

    def pid(self, rank: int) -> int:
        """Of the engine process of `rank`."""
        return self.client._processes[0].pid if rank == 0 else self.daemons[rank - 1].process.pid

    def close(self) -> None:
        """End all."""
        if hasattr(self, "client"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.client._processes[0].pid, signal.SIGCONT)
            self.client.close()
        for daemon in self._started:
            daemon.kill()


@contextlib.contextmanager
def process_ring(
    model: str,
    world_size: int,
    tmp_path: Path,
    *,
    settings: Settings,
    relays: list[Relay] | None = None,
    rejoin_timeout_s: float = 0.0,
) -> Iterator[ProcessRing]:
    """A ring of processes; all are ended at the end. With a list of `relays`, to which they are added, every
    rank dials its right neighbour through one, and so do all others who dial that rank."""
    rings = local_ring(world_size)
    if relays is not None:
        relays += [Relay(ring.port) for ring in rings]
        rights = [Address("127.0.0.1", relays[(rank + 1) % world_size].port) for rank in range(world_size)]
        rings = [ring.replace(right=right) for ring, right in zip(rings, rights, strict=True)]
    specs = [
        EngineSpec(model=model, settings=settings, ring=ring, threads=1, rejoin_timeout_s=rejoin_timeout_s)
        for ring in rings
    ]
    ring = ProcessRing(specs, tmp_path)
    try:
        ring.start()
        yield ring
    finally:
        ring.close()

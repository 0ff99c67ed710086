"""EngineSpec: everything an engine process is started with, and how it gets there.

It travels through an inherited pipe, not the command line or the environment: it may hold the secret.
"""

from __future__ import annotations

import os
import sys

import msgspec

from ringlm.cluster.settings import Settings
from ringlm.ring.address import Address
from ringlm.ring.config import RingConfig


class EngineSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One rank: its paths of model and adapter, its device, its place in a ring, and the shared settings it was given.

    `ring` None with `local_ranks` n stands for n ranks on this machine. `awaits` n: this is rank 0, at whose port n - 1
    others join. `join`: this rank joins there. `asked` is the model as its user named it.
    `rejoin_timeout_s` is how long a lost rank is awaited; 0: it ends the others.
    """

    model: str
    settings: Settings = Settings()
    ring: RingConfig | None = None
    local_ranks: int = 1
    device: str = "auto"
    threads: int | None = None
    adapter: str | None = None
    asked: str = ""
    awaits: int | None = None
    join: Address | None = None
    rejoin_timeout_s: float = 0.0

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.join is None and (self.ring is None or self.ring.rank == 0)

    @property
    def world_size(self) -> int:
        return self.awaits or (self.ring.world_size if self.ring is not None else self.local_ranks)


def command(spec: EngineSpec, channel_fd: int | None = None) -> tuple[list[str], int]:
    """The engine process's command line and the descriptor it must inherit, which holds `spec`."""
    reader, writer = os.pipe()
    os.set_inheritable(reader, True)
    with os.fdopen(writer, "wb") as pipe:
        pipe.write(msgspec.msgpack.encode(spec))  # far below the 64 KiB that a pipe holds
    arguments = [sys.executable, "-m", "ringlm.cluster.worker", "--spec", str(reader)]
    if channel_fd is not None:
        arguments += ["--channel", str(channel_fd)]
    return arguments, reader


def receive(fd: int) -> EngineSpec:
    """The spec that `command` left in descriptor `fd`."""
    with os.fdopen(fd, "rb") as pipe:
        return msgspec.msgpack.decode(pipe.read(), type=EngineSpec)

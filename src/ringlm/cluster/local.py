"""Rings of local ranks: free ports and a fresh secret, all on loopback."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
from typing import Final, cast

from ringlm.errors import ConnectError
from ringlm.ring.address import Address
from ringlm.ring.config import RingConfig
from ringlm.ring.seal import Mode

LOOPBACK = "127.0.0.1"
# Below those that systems give to connections (Linux from 32768, macOS from 49152): a rank that is started again, long
# after its port was chosen, finds it free.
_PORTS: Final = range(10_000, 32_000)
_TRIES: Final = 2_000


def free_ports(count: int) -> list[int]:
    """TCP ports of loopback that nobody listens on now. Raises ConnectError where there are too few."""
    ports: list[int] = []
    for port in secrets.SystemRandom().sample(_PORTS, _TRIES):
        if len(ports) == count:
            return ports
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((LOOPBACK, port))
            ports.append(port)
    raise ConnectError(f"{count} free ports were looked for on {LOOPBACK}, and {len(ports)} are left.")


def local_ring(world_size: int) -> list[RingConfig]:
    """The configurations, by rank, of a ring on this machine alone, sealed as RING_SEAL says. Raises ConfigError."""
    ports = free_ports(world_size)
    secret = secrets.token_hex(16).encode()
    return [
        RingConfig(
            rank=rank,
            world_size=world_size,
            port=ports[rank],
            right=Address(LOOPBACK, ports[(rank + 1) % world_size]),
            secret=secret,
            interface=LOOPBACK,
            seal=cast("Mode | None", os.environ.get("RING_SEAL") or None),  # which it checks
        )
        for rank in range(world_size)
    ]

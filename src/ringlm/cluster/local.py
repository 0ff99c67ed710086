"""Rings of local ranks: free ports and a fresh secret, all on loopback."""

from __future__ import annotations

import os
import secrets
import socket
from typing import cast

from ringlm.ring.address import Address
from ringlm.ring.config import RingConfig
from ringlm.ring.seal import Mode

LOOPBACK = "127.0.0.1"


def free_ports(count: int) -> list[int]:
    """TCP ports of loopback that nobody listens on now."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind((LOOPBACK, 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


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

"""`ringlm join`: this machine becomes a daemon of a ring whose rank 0 takes ranks in. Knows files and addresses."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import NoReturn

from ringlm.cluster.client import serve_rank
from ringlm.cluster.joining import Offer, call
from ringlm.errors import ConnectError
from ringlm.frontend.model import resolve
from ringlm.frontend.settings import engine_spec
from ringlm.ring.address import Address, parse_address, parse_port
from ringlm.ring.config import DEFAULT_PORT, RingConfig, read_secret

_ASK_S = 120.0


@dataclasses.dataclass(frozen=True)
class JoinOptions:
    """Whom to join, and what is this rank's own; `model` None takes what rank 0's user named."""

    rank0: str
    model: str | None
    device: str
    threads: int | None
    adapter: Path | None
    interface: str | None
    secret_file: Path | None


def join(options: JoinOptions) -> NoReturn:
    """The whole command. It does not return; its process becomes the engine's. Raises ConfigError, ModelError and the
    RingError that kept it from joining."""
    rank0 = parse_address(options.rank0, "HOST[:PORT]", DEFAULT_PORT)
    ring = RingConfig(
        port=parse_port(os.environ.get("RING_PORT") or 0, "RING_PORT", zero=True),
        secret=read_secret(os.environ, options.secret_file),
        interface=options.interface or os.environ.get("RING_INTERFACE"),
    )
    name = options.model or _offered(rank0, ring)
    spec = engine_spec(
        resolve(name),
        ring=ring,
        join=rank0,
        device=options.device,
        threads=options.threads,
        adapter=options.adapter,
    )
    serve_rank(spec)


def _offered(rank0: Address, ring: RingConfig) -> str:
    """The model that the ring is to serve, as its user named it."""
    line = call([rank0], ring, deadline=time.monotonic() + _ASK_S)
    try:
        offer = line.hear(time.monotonic() + _ASK_S)
    except OSError as error:
        raise ConnectError(f"rank 0 at {rank0} has taken the call and left: {error}.") from None
    finally:
        line.close()
    if not isinstance(offer, Offer):
        raise ConnectError(f"rank 0 at {rank0} does not say which model it serves; give it with -m.")
    return offer.model

"""The right neighbour by way of a torch TCPStore at the master, as torchrun runs one: where no RING_RIGHT says it."""

from __future__ import annotations

import os
import time
from datetime import timedelta

import msgspec
import torch.distributed as dist

from ringlm.errors import ConfigError, ConnectError
from ringlm.ring.address import Address, address_towards, is_loopback
from ringlm.ring.cards import Port
from ringlm.ring.config import RingConfig


def right_by_store(config: RingConfig, port: int, deadline: float) -> Address:
    """Where the right neighbour listens; this rank does on `port`. Raises ConnectError and ConfigError."""
    master = config.master
    assert master is not None  # RingConfig has checked it
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's agent runs the store
    run = os.environ.get("TORCHELASTIC_RUN_ID", "") + "/" + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    right = (config.rank + 1) % config.world_size
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            master.host,
            master.port,
            is_master=config.rank == 0 and not hosted,
            timeout=timedelta(seconds=config.connect_timeout_s),
            wait_for_workers=False,
        )
        # torchrun's store outlives a ring: the addresses of the next one have other names.
        ring = f"ringlm/{run}/{store.add(f'ringlm/{run}/rings of {config.rank}', 1)}"
        own = Address(address_towards(master), port)
        store.set(f"{ring}/{config.rank}", msgspec.json.encode(own).decode())
        host, port = msgspec.json.decode(store.get(f"{ring}/{right}"), type=tuple[str, Port])
        # The store's owner must not close it before everybody has read.
        store.add(f"{ring}/done", 1)
        while config.rank == 0 and not hosted and store.add(f"{ring}/done", 0) < config.world_size:
            if time.monotonic() > deadline:
                raise ConnectError(f"not all of {config.world_size} ranks came to the master at {master} in time.")
            time.sleep(0.05)
    except (RuntimeError, OSError, msgspec.MsgspecError) as error:  # torch's DistError is a RuntimeError
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ConnectError(f"rank {config.rank} found no rendezvous at the master {master}: {reason}.") from None
    if config.secret is None and not is_loopback(host):
        raise ConfigError(f"rank {right} is at {host}; links beyond loopback need a shared RING_SECRET.")
    return Address(host, port)

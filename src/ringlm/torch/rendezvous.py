"""From a torch.distributed store to a connected Ring: who listens where, and the secret of the group.

Who can read the store can join the group: rank 0 writes a random secret into it. A RING_SECRET that all ranks have
is added to that, and then the store alone is not enough.
"""

from __future__ import annotations

import datetime
import os
import secrets
from typing import Any

import msgspec
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from ringlm.errors import ConnectError
from ringlm.ring import Ring, RingConfig, connect
from ringlm.ring.address import Address, address_towards, interface_address
from ringlm.ring.cards import Port
from ringlm.ring.config import read_secret
from ringlm.ring.handshake import Terms
from ringlm.ring.listener import Listener
from ringlm.ring.sockets import listen


def meet(store: Store, rank: int, world_size: int, timeout_s: float) -> Ring:
    """The ring of the ranks that share `store`, each of which calls this; `timeout_s` is also that of its collectives.

    Raises ConnectError, ConfigError or AuthenticationError.
    """
    if world_size == 1:
        return connect(RingConfig())
    # A store may outlive a group: what a next one writes has other names.
    turn = store.add(f"groups of {rank}", 1)
    store = PrefixStore(f"ringlm {turn}", store)
    if rank == 0:
        store.set("secret", secrets.token_hex(32))
    secret = _get(store, "secret", 0, timeout_s) + (read_secret(os.environ) or b"")
    host = _host(store)
    seal: Any = os.environ.get("RING_SEAL") or None  # RingConfig checks it
    listener = Listener(listen(0, beyond_loopback=True, interface=host), Terms(secret, seal))
    try:
        store.set(f"rank {rank}", msgspec.json.encode(Address(host, listener.port)).decode())
        right = (rank + 1) % world_size
        address = msgspec.json.decode(_get(store, f"rank {right}", right, timeout_s), type=tuple[str, Port])
        config = RingConfig(
            rank=rank,
            world_size=world_size,
            right=Address(*address),
            secret=secret,
            seal=seal,
            interface=host,
            connect_timeout_s=timeout_s,
            timeout_s=timeout_s,
        )
        return connect(config, listener=listener)
    finally:
        listener.close()  # all links are there


def _get(store: Store, key: str, rank: int, timeout_s: float) -> bytes:
    """What `rank` writes under `key`."""
    try:
        store.wait([key], datetime.timedelta(seconds=timeout_s))
        return bytes(store.get(key))
    except RuntimeError as error:  # all of torch's are
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ConnectError(f"rank {rank} has not come to the store of torch.distributed in time: {reason}.") from None


def _host(store: Store) -> str:
    """The address to listen on: RING_INTERFACE, or from which the store is reached; loopback's without either."""
    if os.environ.get("RING_INTERFACE"):
        return interface_address(os.environ["RING_INTERFACE"])
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    master, port = os.environ.get("MASTER_ADDR"), int(os.environ.get("MASTER_PORT", "29500"))
    if isinstance(store, TCPStore):
        master, port = store.host, store.port
    return address_towards(Address(master, port)) if master else "127.0.0.1"

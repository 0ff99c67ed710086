"""`ringlm join`: this machine becomes a daemon of a ring whose rank 0 takes ranks in. Knows files and addresses.

What stands in the way is said before an engine is started.
"""

from __future__ import annotations

import contextlib
import time
from typing import NoReturn

from ringlm.cluster.client import serve_rank
from ringlm.cluster.joining import Line, Offer, call
from ringlm.errors import ConfigError, ConnectError, ModelError
from ringlm.frontend import console
from ringlm.frontend.command_options import JoinOptions
from ringlm.frontend.model import resolve
from ringlm.frontend.secret import secret_to_join
from ringlm.frontend.settings import engine_spec, lone_ring
from ringlm.ring.address import Address, parse_address
from ringlm.ring.config import DEFAULT_PORT, RingConfig
from ringlm.ring.handshake import RefusedError

_SOON_S = 3.0  # after which a rank 0 that does not answer is worth a word
_ASK_S = 120.0


def join(options: JoinOptions) -> NoReturn:
    """The whole command. It does not return; its process becomes the engine's. Raises ConfigError, ModelError and the
    RingError that kept it from joining."""
    rank0 = parse_address(options.rank0, "HOST[:PORT]", DEFAULT_PORT)
    ring = lone_ring(secret_to_join(options.secret_file, rank0), options.interface, options.seal, port=0)
    with contextlib.closing(dial_rank0(rank0, ring)) as line:
        offer = hear_offer(line, rank0)
    if offer.examines:
        raise ConfigError(f"at {rank0} machines are examined, and no ring is formed; type here: ringlm doctor {rank0}")
    name = options.model or offer.model
    try:
        model = resolve(name)
    except ModelError as error:
        if options.model is not None:
            raise
        raise ModelError(f"rank 0 serves {name}, which is not to be had here: {error} Name it here with -m.") from None
    if offer.complete:
        console.notice(f"the ring at {rank0} has its {offer.world_size} ranks; this one waits as a spare.")
    else:
        console.notice(f"joining the ring of {offer.world_size} ranks at {rank0}, which serves {offer.model}.")
    spec = engine_spec(
        model, ring=ring, join=rank0, device=options.device, threads=options.threads, adapter=options.adapter
    )
    serve_rank(spec)


def dial_rank0(rank0: Address, ring: RingConfig) -> Line:
    """A line to it, which may start within two minutes. Raises ConnectError, which says what is in the way, and
    AuthenticationError."""
    try:
        return call([rank0], ring, deadline=time.monotonic() + _SOON_S)
    except RefusedError:
        raise
    except ConnectError as error:
        console.notice(f"{error} Trying for {_ASK_S:g} s.")
        return call([rank0], ring, deadline=time.monotonic() + _ASK_S)


def hear_offer(line: Line, rank0: Address) -> Offer:
    """What ring it is. Raises ConnectError."""
    try:
        offer = line.hear(time.monotonic() + _ASK_S)
    except OSError as error:
        raise ConnectError(f"rank 0 at {rank0} has taken the call and left: {error}.") from None
    if not isinstance(offer, Offer):
        raise ConnectError(f"rank 0 at {rank0} does not say which ring it is; install the same ringlm on both.")
    return offer

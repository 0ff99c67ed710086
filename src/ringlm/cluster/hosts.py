"""`--hosts a,b,c`: the ring of those machines, and how a rank is started on one of them. Starts nothing itself."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import secrets
import shlex
import socket
from typing import NamedTuple

from ringlm.errors import ConfigError
from ringlm.ring.address import Address
from ringlm.ring.config import RingConfig, read_secret

# A dead link is noticed in 15 s. Logins that want a password fail: many would ask for theirs at once.
_SSH = ["ssh", "-T", *("-o", "BatchMode=yes"), *("-o", "ConnectTimeout=15")]
_SSH += [*("-o", "ServerAliveInterval=5"), *("-o", "ServerAliveCountMax=3")]
_LOGIN = re.compile(r"([\w.-]+@)?[\w.:%][\w.:%-]*")


class Host(NamedTuple):
    """A machine by its address in the ring, and who to be there; None: whoever ssh takes."""

    name: str
    user: str | None = None

    def __str__(self) -> str:
        return f"{self.user}@{self.name}" if self.user else self.name

    @property
    def here(self) -> bool:
        """Whether it is this machine, which needs no ssh: an address of its own that can be bound, and no user."""
        if self.user is not None:
            return False
        with contextlib.suppress(OSError, UnicodeError):
            family, kind, protocol, _, address = socket.getaddrinfo(self.name, 0, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind, protocol) as probe:
                probe.bind(address)
                return True
        return False

    def ssh(self, python: str) -> list[str]:
        """The command that starts a rank there (`remote.py`), with the Python of that path."""
        return [*_SSH, "--", str(self), f"exec {shlex.quote(python)} -m ringlm.cluster.remote"]


def parse_hosts(text: str) -> tuple[Host, ...]:
    """`--hosts` in rank order. Raises ConfigError."""
    hosts = []
    for part in text.split(","):
        if not _LOGIN.fullmatch(part.strip()):  # nor may it be taken for an option of ssh's
            raise ConfigError(f"--hosts holds {part!r}; write HOST or USER@HOST, with commas between, in rank order.")
        user, _, name = part.strip().rpartition("@")
        hosts.append(Host(name, user or None))
    return tuple(hosts)


def ring_of(hosts: tuple[Host, ...], port: int) -> list[RingConfig]:
    """The configurations by rank. Ranks of one host have ports one after the other. Raises ConfigError.

    The secret is the environment's, or a fresh one of 128 bits.
    """
    secret = read_secret(os.environ) or secrets.token_hex(16).encode()
    seen: dict[str, int] = {}
    addresses = []
    for host in hosts:
        addresses.append(Address(host.name, port + seen.setdefault(host.name, 0)))
        seen[host.name] += 1
    return [
        RingConfig(
            rank=rank,
            world_size=len(hosts),
            port=address.port,
            right=addresses[(rank + 1) % len(hosts)],
            secret=secret,
            interface=host.name if _is_number(host.name) else None,  # a name may stand for addresses that change
        )
        for rank, (host, address) in enumerate(zip(hosts, addresses, strict=True))
    ]


def _is_number(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True

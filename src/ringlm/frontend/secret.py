"""The secret of a ring that others join: made once and kept by rank 0's user, asked for where they join."""

from __future__ import annotations

import getpass
import os
import secrets
import sys
from collections.abc import Callable
from pathlib import Path

from ringlm import logs
from ringlm.errors import ConfigError
from ringlm.frontend import console
from ringlm.paths import atomic_write, state_dir
from ringlm.ring.address import Address, interface_address, is_loopback, own_address
from ringlm.ring.config import DEFAULT_PORT, RingConfig, read_secret


def kept_at() -> Path:
    """Where this user's secret is, once there is one. A rank 0 that starts again has the secret of those who wait."""
    return state_dir() / "ring.secret"


def secret_to_lead(file: Path | None) -> bytes:
    """The one that was given, else the kept one, which is made if need be: 128 bits. Raises ConfigError."""
    given = read_secret(os.environ, file)
    if given is not None:
        return given
    path = kept_at()
    if not path.exists():
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with atomic_write(path) as out:  # which nobody else may read
                out.write(secrets.token_hex(16).encode())
        except OSError as error:
            raise ConfigError(f"no secret was given, and none can be kept in {path}: {error.strerror}.") from None
    if path.stat().st_mode & 0o077:
        raise ConfigError(f"others may read {path}; remove it for a new secret, or mend it: chmod 600 {path}")
    return _read(path)


def secret_to_join(file: Path | None, rank0: Address) -> bytes | None:
    """The one that was given, else the kept one if rank 0 is here, else what is typed. Raises ConfigError."""
    given = read_secret(os.environ, file)
    if given is not None:
        return given
    if is_loopback(rank0.host):
        return _read(kept_at()) if kept_at().exists() else None
    if not sys.stdin.isatty():
        raise ConfigError(
            f"the ring at {rank0} has a secret, which rank 0 tells its user, and there is no terminal to ask for it "
            "here: give --secret-file, or set RING_SECRET or RING_SECRET_FILE."
        )
    return getpass.getpass(f"Secret of the ring at {rank0}: ").strip().encode()


def invite(ring: RingConfig, command: str, count: int, tell: Callable[[str], None]) -> None:
    """Tell how `count` others come to rank 0, which is here, and where the secret is that they are asked for; the
    secret itself at a terminal only."""
    path = kept_at()
    host = interface_address(ring.interface) if ring.interface else own_address()
    at = host if ring.port == DEFAULT_PORT else str(Address(host, ring.port))
    tell(f"waiting for {count} to join, each by: ringlm {command} {at}")
    kept = path.exists() and ring.secret == path.read_bytes()
    tell(f"they need the secret {f'in {path}' if kept else 'that was given here'}")
    if kept and ring.secret is not None and console.stderr().is_terminal and not logs.as_json():
        console.note(f"the secret: {ring.secret.decode()}")


def _read(path: Path) -> bytes:
    secret = read_secret({}, path)
    assert secret is not None  # a file that is there has one
    return secret

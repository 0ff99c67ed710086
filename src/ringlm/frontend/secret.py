"""The secret of a ring that others join: made once and kept by rank 0's user, asked for where they join."""

from __future__ import annotations

import getpass
import os
import secrets
import sys
from pathlib import Path

from ringlm.errors import ConfigError
from ringlm.paths import atomic_write, state_dir
from ringlm.ring.address import Address, is_loopback
from ringlm.ring.config import read_secret


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


def _read(path: Path) -> bytes:
    secret = read_secret({}, path)
    assert secret is not None  # a file that is there has one
    return secret

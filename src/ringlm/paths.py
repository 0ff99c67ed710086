"""Where ringlm keeps files of its own: caches and history, by the XDG rules. Creates nothing itself."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO


def cache_dir() -> Path:
    """What may be deleted at any time and is made again: $XDG_CACHE_HOME/ringlm or ~/.cache/ringlm."""
    return _base("XDG_CACHE_HOME", ".cache")


def state_dir() -> Path:
    """What is the user's: $XDG_STATE_HOME/ringlm or ~/.local/state/ringlm."""
    return _base("XDG_STATE_HOME", ".local/state")


def _base(variable: str, default: str) -> Path:
    # Relative paths are to be ignored, says the XDG base directory specification.
    given = Path(os.environ.get(variable, ""))
    return (given if given.is_absolute() else Path.home() / default) / "ringlm"


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """A file that appears at `path` whole or not at all, whoever else writes it at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
        try:
            yield file
            file.close()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise

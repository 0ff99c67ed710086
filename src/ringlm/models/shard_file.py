"""One rank's packed matrices in a file, so that the next start need not pack again.

A safetensors file, written while the shard is packed, that appears whole or not at all. Files are kept in the cache
folder up to a size, the latest used. Knows names and tensors; not what they mean.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Final

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ringlm.errors import ConfigError
from ringlm.paths import cache_dir

log = logging.getLogger("ringlm")

LIMIT_VARIABLE: Final = "RINGLM_SHARD_CACHE_GB"
_DEFAULT_LIMIT_GB: Final = 64.0
_LAYOUT: Final = 1  # of packed matrices in memory; files of another are never read
_PARTIAL: Final = "partial-"
_DTYPES: Final = {torch.uint8: "U8", torch.float16: "F16"}


def shard_path(*key: object) -> Path:
    """Where the shard that `key` describes in full is kept; whoever changes a part of it gets another file."""
    digest = hashlib.blake2b(repr((_LAYOUT, key)).encode(), digest_size=16).hexdigest()
    return cache_dir() / "shards" / f"{digest}.safetensors"


class ShardFile:
    """A shard that was written earlier; its tensors are mapped, private to this process."""

    def __init__(self, path: Path) -> None:
        self._file: Any = safe_open(path, "pt")

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Those whose names begin with `prefix` and a dot, by what follows it."""
        start = prefix + "."
        names = [name for name in self._file.keys() if name.startswith(start)]  # noqa: SIM118
        return {name.removeprefix(start): self._file.get_tensor(name) for name in names}

    @staticmethod
    def find(path: Path, layout: Mapping[str, Tensor]) -> ShardFile | None:
        """The file at `path`, if there is one with just the tensors of `layout`; it counts as used now."""
        try:
            found = ShardFile(path)
            for name, tensor in layout.items():
                part = found._file.get_slice(name)
                if (tuple(part.get_shape()), part.get_dtype()) != (tuple(tensor.shape), _DTYPES[tensor.dtype]):
                    return None
            os.utime(path)
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError) as error:
            log.warning("the packed shard %s cannot be used (%s); packing again", path, error)
            return None
        return found


class ShardWriter:
    """Writes the tensors of `layout`, in its order, to a file that appears at `path` when all have come."""

    def __init__(self, path: Path, layout: Mapping[str, Tensor]) -> None:
        self._path, self._expected = path, list(layout)
        self._file: IO[bytes] | None = None
        self._written = 0
        header, end = {}, 0
        for name, tensor in layout.items():
            offsets = [end, end + tensor.nbytes]
            header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
            end = offsets[1]
        limit = cache_limit()
        if end > limit:
            if limit:
                log.warning(
                    "this shard of %.1f GB is more than the cache holds; %s allows more", end / 1e9, LIMIT_VARIABLE
                )
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _make_room(path.parent, limit - end)
            if shutil.disk_usage(path.parent).free < 2 * end:
                log.warning("too little disk is free in %s to keep the packed shard of %.1f GB", path.parent, end / 1e9)
                return
            text = msgspec.json.encode(header)
            text += b" " * (-len(text) % 64)
            self._file = tempfile.NamedTemporaryFile(dir=path.parent, prefix=_PARTIAL, delete=False)  # noqa: SIM115
            self._file.write(len(text).to_bytes(8, "little") + text)
        except OSError as error:
            self._give_up(error)

    def write(self, name: str, tensor: Tensor) -> None:
        """Add the next tensor; one that cannot be written ends the file, not the load."""
        if self._file is None:
            return
        assert self._expected[self._written] == name
        self._written += 1
        try:
            if tensor.numel():
                self._file.write(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        except OSError as error:
            self._give_up(error)

    def finish(self) -> None:
        """Let the file appear."""
        if self._file is None or self._written < len(self._expected):
            self.discard()
            return
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._file.name, self._path)
        except OSError as error:
            self._give_up(error)
        self._file = None

    def discard(self) -> None:
        """Remove what has been written, if it has not appeared."""
        if self._file is not None:
            self._file.close()
            with contextlib.suppress(OSError):
                os.unlink(self._file.name)
            self._file = None

    def _give_up(self, error: OSError) -> None:
        log.warning("the packed shard cannot be kept in %s: %s", self._path.parent, error)
        self.discard()


def cache_limit() -> int:
    """How many bytes of packed shards are kept. Raises ConfigError for a value that is no number."""
    text = os.environ.get(LIMIT_VARIABLE, str(_DEFAULT_LIMIT_GB))
    try:
        limit = float(text)
    except ValueError:
        limit = math.nan
    if not 0 <= limit < math.inf:
        raise ConfigError(f"{LIMIT_VARIABLE} is {text!r}; give gigabytes, such as 64, or 0 to keep no packed shards.")
    return int(limit * 1e9)


def _make_room(folder: Path, limit: int) -> None:
    """Remove the files that were used longest ago until at most `limit` bytes are left."""
    files = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another rank may clean up as well
            status = path.stat()
            files.append((status.st_mtime, status.st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= limit:
            return
        path.unlink(missing_ok=True)  # who has it mapped keeps it
        total -= size

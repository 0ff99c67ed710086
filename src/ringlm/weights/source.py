"""Where tensors come from: what a loader may ask of any model file. Knows no format and no model."""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

import msgspec

from ringlm.errors import ModelError

if TYPE_CHECKING:
    import torch

    from ringlm.weights.packed import Packed

Cut: TypeAlias = slice | None  # None: all of it
SAMPLE_BYTES = 64  # read at the start, the middle and the end of every tensor for the fingerprint


@dataclass(frozen=True)
class Entry:
    """One tensor in a file: `dtype` in the file's own words, `offset` in bytes from the file's start."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Form(NamedTuple):
    """How codes are packed: in blocks of 32 of a row, each with a float16 scale and, if `minimums`, a minimum."""

    bits: int  # 4 or 8
    minimums: bool

    @property
    def nbytes(self) -> int:
        """Of a block."""
        return 4 * self.bits + (4 if self.minimums else 2)


class Tensors:
    """Named tensors in files, without their content. `label` is where one is missed."""

    def __init__(self, label: str, entries: Mapping[str, Entry]) -> None:
        self.entries = entries
        self._label = label

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries.values())

    def names(self) -> tuple[str, ...]:
        return tuple(self.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entry(name).shape

    def place(self, name: str) -> str:
        return f"{self.entry(name).path.name}: tensor {name!r}"

    def entry(self, name: str) -> Entry:
        """Where it lies; ModelError where there is none of that name."""
        if name not in self.entries:
            raise ModelError(f"{self._label}: tensor {name!r} is missing.")
        return self.entries[name]


class WeightSource(Protocol):
    """Tensors by their Hugging Face names and in Hugging Face layout, read by slice."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as they lie in the files."""
        ...

    def names(self) -> tuple[str, ...]: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; ModelError where there is none of that name."""
        ...

    def place(self, name: str) -> str:
        """How an error message calls this tensor: "model.safetensors: tensor 'model.norm.weight'"."""
        ...

    def read(self, name: str, rows: Cut = None, columns: Cut = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        """`tensor[rows]` or `tensor[rows, columns]`, contiguous, in `dtype` (None: the file's, or float32 where
        that is quantized). Only that part of the file is read; slices have step 1 and lie within the shape."""
        ...

    def packed(self, name: str, rows: slice, blocks: slice) -> Packed | None:
        """`rows` and blocks of 32 columns of a matrix as the file packs it, codes as they are; None where the file
        holds it in floats, or in codes that do not fit blocks of 32."""
        ...

    def form(self, name: str) -> Form | None:
        """The form of what `packed` gives; None where that gives none. Reads nothing, and needs no torch."""
        ...


def fingerprint(config: Mapping[str, Any], entries: Mapping[str, Entry]) -> str:
    """`configuration=…,shapes=…,weights=…`: digests of the configuration, of every tensor's name, shape, dtype and
    size, and of a sample of its bytes. Equal for equal models however their tensors are spread over files, and quick
    for any size."""
    configuration, shapes, weights = (hashlib.blake2b(digest_size=8) for _ in range(3))
    configuration.update(msgspec.json.encode(config, order="deterministic"))
    files: dict[Path, int] = {}
    try:
        for name, entry in sorted(entries.items()):
            if entry.path not in files:
                files[entry.path] = os.open(entry.path, os.O_RDONLY)
            shapes.update(repr((name, entry.shape, entry.dtype, entry.nbytes)).encode())
            last = max(0, entry.nbytes - SAMPLE_BYTES)
            for start in (0, last // 2, last):
                size = min(SAMPLE_BYTES, entry.nbytes - start)
                weights.update(os.pread(files[entry.path], size, entry.offset + start))
    finally:
        for descriptor in files.values():
            os.close(descriptor)
    digests = {"configuration": configuration, "shapes": shapes, "weights": weights}
    return ",".join(f"{what}={digest.hexdigest()}" for what, digest in digests.items())


def release(mapped: mmap.mmap, start: int, stop: int) -> None:
    """Let go of the pages that lie within bytes [start, stop) and have been read; the system may keep them cached."""
    if hasattr(mmap, "MADV_DONTNEED"):
        first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE
        if first < last:
            mapped.madvise(mmap.MADV_DONTNEED, first, last - first)


def bounds(part: slice | None, size: int) -> tuple[int, int]:
    """(start, stop) of a slice with step 1 that lies within `size`; ValueError otherwise."""
    if part is None:
        return 0, size
    start, stop = part.start or 0, size if part.stop is None else part.stop
    if part.step not in (None, 1) or not 0 <= start <= stop <= size:
        raise ValueError(f"{part} is not a part of {size}")
    return start, stop

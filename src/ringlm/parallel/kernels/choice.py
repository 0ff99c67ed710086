"""From how many rows of activations on a packed matrix is better unpacked: measured once on each machine and kept.

Products of bytes read the least memory, which is all that counts for a few rows; instructions for bfloat16, where a
CPU has them, are faster for many. Where the lines cross differs from machine to machine.
"""

from __future__ import annotations

import logging
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec
import torch

from ringlm.paths import atomic_write, cache_dir

log = logging.getLogger("ringlm")

NEVER: Final = 1 << 62
_TRIED: Final = (16, 24, 32, 48, 64, 96, 128, 256)  # rows
_TURNS: Final = 5

Product = Callable[[torch.Tensor], object]


class _Kept(msgspec.Struct):
    """What is known of this machine: by processor, torch and threads, from how many rows on to unpack."""

    unpack_from: dict[str, int] = {}


def unpack_from(sample: Callable[[int], Product], columns: int) -> int:
    """The fewest rows (rows, columns) for which unpacking is faster, NEVER if it is not. `sample` gives the product
    with some matrix that is unpacked from so many rows on. Measured the first time, later read from the cache."""
    path = cache_dir() / "products.json"
    key = f"{processor()}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    kept = _read(path)
    if key not in kept.unpack_from:
        kept.unpack_from[key] = _measure(sample(NEVER), sample(0), columns)
        try:
            with atomic_write(path) as file:
                file.write(msgspec.json.format(msgspec.json.encode(kept)))
        except OSError as error:
            log.warning("what was measured of this machine's products cannot be kept in %s: %s", path, error)
    return kept.unpack_from[key]


def _read(path: Path) -> _Kept:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Kept)
    except FileNotFoundError:
        return _Kept()
    except (OSError, msgspec.MsgspecError) as error:
        log.warning("%s cannot be used (%s); measuring again", path, error)
        return _Kept()


def _measure(by_bytes: Product, by_unpacking: Product, columns: int) -> int:
    """Down from the most rows: where unpacking does not help those, fewer need not be tried."""
    found = NEVER
    for rows in reversed(_TRIED):
        x = torch.ones(rows, columns)
        ours: list[float] = []
        theirs: list[float] = []
        for turn in range(_TURNS + 1):
            for product, times in ((by_bytes, ours), (by_unpacking, theirs)):
                started = time.perf_counter()
                product(x)
                if turn:  # the first compiles, and brings things into the cache
                    times.append(time.perf_counter() - started)
        if min(theirs) >= min(ours):  # the fastest turns: what nothing else got in the way of
            break
        found = rows
    return found


def processor() -> str:
    """Its name and instructions, as far as the system tells."""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            name = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), name)
    return f"{name} with {torch.backends.cpu.get_cpu_capability()}{_bfloat16()}"


def _bfloat16() -> str:
    return ", bfloat16" * torch.cpu._is_avx512_bf16_supported() + ", AMX" * torch.cpu._is_amx_tile_supported()

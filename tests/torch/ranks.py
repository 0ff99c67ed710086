"""Processes of a torch.distributed group over the ring, with gloo's beside it."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from tests.processes import DEADLINE_S, Processes


class Here(NamedTuple):
    """What a call gets: this rank, and gloo's group of the same ranks, if one was asked for."""

    rank: int
    world_size: int
    gloo: Any


class Ranks(Processes):
    """`world_size` processes whose default group is the ring's, at `store`; without one they have none yet."""

    def __init__(
        self, world_size: int, store: Path | None, *, gloo: bool = True, timeout_s: float = DEADLINE_S
    ) -> None:
        super().__init__([partial(_here, rank, world_size, store, gloo, timeout_s) for rank in range(world_size)])


@contextlib.contextmanager
def _here(rank: int, world_size: int, store: Path | None, gloo: bool, timeout_s: float) -> Iterator[Here]:
    os.environ.pop("RING_SECRET", None)
    theirs = None
    if store is not None:
        limit = datetime.timedelta(seconds=timeout_s)
        dist.init_process_group("ring", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=limit)
        theirs = dist.new_group(backend="gloo") if gloo else None
    yield Here(rank, world_size, theirs)

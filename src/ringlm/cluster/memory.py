"""How much memory is free for a rank, and whether what ranks would hold fits into it. Torch-free; knows bytes only."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from ringlm.errors import ConfigError
from ringlm.models.sizes import BLOCK, Holding
from ringlm.ring.address import machine_id

_SHARE_PERCENT = 90  # of what weights leave goes to the cache at most: computing takes memory, too
_CGROUPS = Path("/sys/fs/cgroup")
_GROUPS = Path("/proc/self/cgroup")  # those of this process


class UnfitError(ConfigError):
    """What `ranks`, which share a memory, would hold does not fit into it; with the arithmetic."""

    def __init__(self, text: str, ranks: list[int]) -> None:
        super().__init__(text)
        self.ranks = ranks


class Memory(msgspec.Struct, frozen=True, array_like=True):
    """`free` bytes; ranks that name the same `pool`, a machine's or a GPU's, share them."""

    pool: str
    free: int


def host_memory() -> Memory:
    """This machine's: what can be had without swapping. Where a control group leaves less, such as a container's,
    that is a pool of its own."""
    import psutil

    free = psutil.virtual_memory().available
    limit = min(_group_limits(), default=free)
    if limit >= free:
        return Memory(machine_id(), free)
    return Memory(f"{machine_id()} {os.readlink('/proc/self/ns/cgroup')} {_GROUPS.read_text()}", limit)


def free_blocks(holdings: Sequence[Holding], memory: Sequence[Memory]) -> int:
    """For how many blocks of the cache every rank has memory beside its weights and what it computes with; less than 1
    where there is none."""
    counts = []
    for ranks, free in _pools(memory):
        block = sum(holdings[rank].block for rank in ranks)
        left = free - sum(holdings[rank].weights for rank in ranks)
        if block or left < 0:
            counts.append(left * _SHARE_PERCENT // 100 // max(1, block))
    return min(counts, default=0)


def fits(holdings: Sequence[Holding], memory: Sequence[Memory], blocks: int) -> list[bool]:
    """By rank, whether its memory holds its weights and a cache of `blocks`, and those of the ranks that share it."""
    found = [True] * len(memory)
    for ranks, free in _pools(memory):
        fit = sum(holdings[rank].total(blocks) for rank in ranks) <= free
        for rank in ranks:
            found[rank] = fit
    return found


def refuse_unfit(holdings: Sequence[Holding], memory: Sequence[Memory], *, blocks: int, quant: str) -> None:
    """Raises UnfitError for ranks whose memory is too small for a cache of `blocks`."""
    for ranks, free in _pools(memory):
        weights = sum(holdings[rank].weights for rank in ranks)
        cache = sum(holdings[rank].block for rank in ranks) * blocks
        if weights + cache <= free:
            continue
        who = f"rank {ranks[0]} needs"
        if len(ranks) > 1:
            who = f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]} share their memory and need"
        packed = "" if quant == "int4" else ", --quant int4"
        raise UnfitError(
            f"{who} {size(weights + cache)} (weights {size(weights)}, cache {size(cache)} for "
            f"{blocks * BLOCK:,} tokens), and {size(free)} are free there. Take a smaller --context{packed}, another "
            "--split, or one more machine.",
            ranks,
        )


def size(nbytes: int) -> str:
    """Bytes for people: 18.1 GB, 2.04 GB, 41 MB, 0.1 MB."""
    if nbytes >= 1e9:
        return f"{nbytes / 1e9:,.1f} GB" if nbytes >= 1e10 else f"{nbytes / 1e9:.2f} GB"
    return f"{nbytes / 1e6:,.0f} MB" if nbytes >= 1e7 else f"{nbytes / 1e6:,.1f} MB"


def _pools(memory: Sequence[Memory]) -> list[tuple[list[int], int]]:
    """The ranks that share one memory, and what is free there before any of them has loaded anything: who joined later
    has seen less, since others had."""
    pools: dict[str, list[int]] = {}
    for rank, one in enumerate(memory):
        pools.setdefault(one.pool, []).append(rank)
    return [(ranks, max(memory[rank].free for rank in ranks)) for ranks in pools.values()]


def _group_limits() -> Iterator[int]:
    """What the limits of this process's control groups leave, of version 2 and of version 1; none elsewhere."""
    try:
        groups = [line.split(":", 2)[1:] for line in _GROUPS.read_text().splitlines()]
    except OSError:
        return
    for controllers, path in groups:
        if controllers not in ("", "memory"):
            continue
        files = "memory.max", "memory.current", "inactive_file"
        root = _CGROUPS
        if controllers:
            files, root = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"), root / "memory"
        folder = root / path.strip("/")
        for group in (folder, *folder.parents):
            if group.is_relative_to(root):
                yield from _left(group, *files)


def _left(group: Path, limit: str, used: str, cached: str) -> Iterator[int]:
    """The limit less what is in use; cached files make room. Nothing where there is no limit."""
    try:
        most, now = int((group / limit).read_text()), int((group / used).read_text())
        figures = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        yield most - now + int(figures[cached])
    except (OSError, ValueError, KeyError):
        return  # "max", or not a group that counts memory

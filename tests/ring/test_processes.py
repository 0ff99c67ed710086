"""The same sums between processes, and beside gloo's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ringlm.ring import Ring
from tests.ring.helpers import DTYPES, ProcessRing, contribution, expected_sum

LENGTHS = (0, 1, 2, 3, 5, 1536, 8191, 8193, 100_003, 300_001)


def sums(ring: Ring, dtype: torch.dtype) -> bool:
    """Whether every sum is, to the bit, the reference's."""
    return all(
        torch.equal(
            ring.all_reduce(contribution(length, ring.rank, length, dtype)),
            expected_sum(length, ring.world_size, length, dtype),
        )
        for length in LENGTHS
    )


def rest(ring: Ring, root: int) -> bool:
    """broadcast and gather, all kinds."""
    there = ring.broadcast(torch.full((3, 50_000), float(ring.rank)), root)
    pieces = ring.gather(torch.full((2, 3 * ring.rank), float(ring.rank)), root)
    said = ring.broadcast_bytes(b"step" * 1000 if ring.rank == root else None, root)
    heard = ring.gather_bytes(bytes([ring.rank]) * 100 * ring.rank, root)
    if ring.rank == root:
        assert pieces is not None
        assert [tuple(piece.shape) for piece in pieces] == [(2, 3 * rank) for rank in range(ring.world_size)]
        assert all(bool((piece == rank).all()) for rank, piece in enumerate(pieces))
        assert heard == [bytes([rank]) * 100 * rank for rank in range(ring.world_size)]
    return bool((there == root).all()) and said == b"step" * 1000


def beside_gloo(ring: Ring, store: str) -> float:
    """Integers, exact in any order, element by element; the largest difference of anything else."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=ring.rank, world_size=ring.world_size)
    worst = 0.0
    for length in LENGTHS[1:]:
        for dtype in (torch.float32, torch.float64, torch.int64):
            ours = contribution(length, ring.rank, length, dtype)
            whole = ours.round() if dtype.is_floating_point else ours
            theirs, exact, whole_theirs = ours.clone(), whole.clone(), whole.clone()
            for mine, other in ((ours, theirs), (exact, whole_theirs)):
                ring.all_reduce(mine)
                dist.all_reduce(other)
            assert torch.equal(exact, whole_theirs)
            worst = max(worst, float((ours - theirs).abs().max()))
    dist.destroy_process_group()
    return worst


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_between_processes(world_size: int, tmp_path: Path) -> None:
    with ProcessRing(world_size, secret=b"between processes") as ring:
        for dtype in DTYPES:
            assert ring.call(sums, dtype) == [True] * world_size
        for root in range(world_size):
            assert ring.call(rest, root) == [True] * world_size
        for worst in ring.call(beside_gloo, str(tmp_path / "store")):
            assert worst < 2e-3  # contributions reach thousands, in float32

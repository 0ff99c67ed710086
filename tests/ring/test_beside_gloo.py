"""Every collective beside gloo's, element by element: by dtype, reduction, world size; directly, in the background
and in a subgroup."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ringlm.ring import Ring
from ringlm.ring.collectives import Collectives
from tests.ring.helpers import ProcessRing

DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int8,
    torch.uint8,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.complex64,
    torch.complex128,
)
REDUCTIONS = {
    "sum": dist.ReduceOp.SUM,
    "product": dist.ReduceOp.PRODUCT,
    "min": dist.ReduceOp.MIN,
    "max": dist.ReduceOp.MAX,
    "and": dist.ReduceOp.BAND,
    "or": dist.ReduceOp.BOR,
    "xor": dist.ReduceOp.BXOR,
}
LENGTHS = (0, 1, 7, 1000, 70_001)
HOW = ("directly", "in the background", "in a group")
Run = Callable[..., Any]


def values(seed: int, rank: int, length: int, dtype: torch.dtype) -> torch.Tensor:
    """Small whole numbers, whose sums and products of four no dtype rounds; fractions where `seed` is odd."""
    generator = torch.Generator().manual_seed(100 * seed + rank)
    if dtype.is_complex:
        parts = torch.randint(-3, 4, (2, length), generator=generator).double()
        return torch.complex(parts[0], parts[1]).to(dtype)
    if dtype == torch.bool:
        return torch.randint(0, 2, (length,), generator=generator).bool()
    whole = torch.randint(0 if dtype == torch.uint8 else -3, 4, (length,), generator=generator).to(dtype)
    return whole * 0.37 if dtype.is_floating_point and seed % 2 else whole


def defined(reduction: str, dtype: torch.dtype) -> bool:
    inexact = dtype.is_floating_point or dtype.is_complex
    if reduction in ("and", "or", "xor"):
        return not inexact
    return reduction == "sum" or not dtype.is_complex


def plain(tensor: Any) -> Any:
    """The same memory as gloo takes it everywhere: booleans as bytes, complex numbers as pairs."""
    if isinstance(tensor, list):
        return [plain(piece) for piece in tensor]
    if tensor is None or not (tensor.dtype == torch.bool or tensor.dtype.is_complex):
        return tensor
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else torch.view_as_real(tensor).view(-1)


def reductions(group: Collectives, run: Run, theirs: Any, dtype: torch.dtype) -> Iterator[tuple[str, Any, Any]]:
    """(what, ours, gloo's) of everything that combines."""
    n, rank = group.world_size, group.rank
    for seed, (reduction, op) in enumerate(REDUCTIONS.items()):
        if not defined(reduction, dtype):
            continue
        for length in LENGTHS:
            mine = values(seed, rank, length, dtype)
            expected = mine.clone()
            if length:
                dist.all_reduce(plain(expected), op, group=theirs)
            yield f"all_reduce {reduction} {length}", run(group.all_reduce, mine.clone(), reduction), expected
            for root in range(n):
                ours, expected = mine.clone(), mine.clone()
                if length:
                    dist.reduce(plain(expected), group=theirs, group_dst=root, op=op)
                run(group.reduce, ours, root, reduction)
                yield f"reduce {reduction} {length}", ours, expected if rank == root else mine
            pieces = [values(seed, 10 * rank + peer, length + peer, dtype) for peer in range(n)]
            before = [piece.clone() for piece in pieces]
            all_of_mine = []
            for piece in pieces:  # gloo's pieces are of one size: a sum over all stands in
                total = piece.clone()
                if len(total):
                    dist.all_reduce(plain(total), op, group=theirs)
                all_of_mine.append(total)
            yield (
                f"reduce_scatter {reduction} {length}",
                run(group.reduce_scatter, pieces, reduction),
                all_of_mine[rank],
            )
            assert all(torch.equal(a, b) for a, b in zip(pieces, before, strict=True))


def movements(group: Collectives, run: Run, theirs: Any, dtype: torch.dtype) -> Iterator[tuple[str, Any, Any]]:
    """(what, ours, gloo's) of everything that only moves."""
    n, rank = group.world_size, group.rank
    for length in LENGTHS:
        mine = values(0, rank, length, dtype)
        wide = values(2, rank, 6 * length, dtype).view(3, 2 * length).t()  # not contiguous
        for root in range(n):
            ours, expected = wide.clone(), wide.contiguous()
            dist.broadcast(plain(expected.view(-1)), group=theirs, group_src=root)
            yield f"broadcast {length}", run(group.broadcast, ours, root), expected
            found = [torch.empty_like(mine) for _ in range(n)] if rank == root else None
            dist.gather(plain(mine), plain(found), group=theirs, group_dst=root)
            yield f"gather {length}", run(group.gather, mine, root), found
            pieces = [values(4, 10 * root + peer, length, dtype) for peer in range(n)] if rank == root else None
            ours, expected = torch.zeros_like(mine), torch.zeros_like(mine)
            dist.scatter(plain(expected), plain(pieces), group=theirs, group_src=root)
            yield f"scatter {length}", run(group.scatter, pieces, ours, root), expected
        found = [torch.empty_like(mine) for _ in range(n)]
        dist.all_gather(plain(found), plain(mine), group=theirs)
        yield f"all_gather {length}", run(group.all_gather, mine), found
        out = [torch.empty_like(mine) for _ in range(n)]
        assert run(group.all_gather, mine, out) == out
        yield f"all_gather into {length}", out, found

        sizes = [[(length * (1 + giver) + 2 * taker) % (length + 3) for taker in range(n)] for giver in range(n)]
        pieces = [values(6, 10 * rank + peer, sizes[rank][peer], dtype) for peer in range(n)]
        expected = torch.empty(sum(sizes[peer][rank] for peer in range(n)), dtype=dtype)
        unit = 2 if dtype.is_complex else 1
        given = [unit * size for size in sizes[rank]]
        taken = [unit * sizes[peer][rank] for peer in range(n)]
        dist.all_to_all_single(plain(expected), plain(torch.cat(pieces)), taken, given, group=theirs)
        yield f"all_to_all {length}", torch.cat(run(group.all_to_all, pieces)), expected

        right, left = (rank + 1) % n, (rank - 1) % n
        ours = torch.empty_like(mine)
        run(group.send, mine, right, length)
        assert run(group.recv, ours, left, length) == left
        yield f"send and recv {length}", ours, found[left]


def equal(ours: Any, theirs: Any) -> bool:
    if isinstance(theirs, list):
        return len(ours) == len(theirs) and all(equal(a, b) for a, b in zip(ours, theirs, strict=True))
    if ours is None or theirs is None:
        return ours is theirs
    if ours.dtype == torch.bool:
        theirs = theirs.view(torch.uint8).bool()  # gloo's sums of booleans are numbers
    if ours.dtype in (torch.float16, torch.bfloat16):
        return bool(torch.allclose(ours.float(), theirs.float(), rtol=0.02, atol=0.02))
    return bool(torch.equal(ours, theirs) or torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5))


def beside_gloo(ring: Ring, store: str, how: str) -> list[str]:
    """What differs."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=ring.rank, world_size=ring.world_size)
    group: Collectives = ring
    theirs = None
    if how == "in a group":  # all but rank 0, who has a group of its own
        both = [dist.new_group([0]), dist.new_group(list(range(1, ring.world_size)))]
        theirs = both[min(ring.rank, 1)]
        group = ring.group([0] if ring.rank == 0 else range(1, ring.world_size))

    def run(call: Callable[..., Any], *arguments: Any) -> Any:
        return ring.submit(call, *arguments).wait(20.0) if how == "in the background" else call(*arguments)

    wrong = []
    if group.world_size > 1:
        for dtype in DTYPES:
            for what, ours, expected in (*movements(group, run, theirs, dtype), *reductions(group, run, theirs, dtype)):
                if not equal(ours, expected):
                    wrong.append(f"{what} of {dtype}: {ours} is not {expected}")
                if what.startswith("all_reduce") and ours.numel():  # to the bit, on every rank
                    first = group.broadcast(ours.clone()).view(torch.uint8)
                    if not torch.equal(ours.view(torch.uint8), first):
                        wrong.append(f"{what} of {dtype} differs from rank 0's")
    run(group.barrier)
    run(ring.barrier)
    dist.destroy_process_group()
    return wrong[:10]


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("how", HOW)
def test_every_collective(world_size: int, how: str, tmp_path: Path) -> None:
    # small segments, so that every algorithm comes in turn
    with ProcessRing(world_size, options={"segment_bytes": 1 << 14, "direct_bytes": 1 << 10}) as ring:
        for rank in range(world_size):
            ring.start(rank, beside_gloo, str(tmp_path / "store"), how)
        for rank in range(world_size):
            assert ring.result(rank, 100.0) == [], rank

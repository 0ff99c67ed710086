"""Every collective beside gloo's, element by element: by dtype, reduction, world size; directly and in the background,
and in a subgroup. Each of gloo's answers judges both ways of asking. Roots take turns, so that each comes with every
reduction and dtype, but not with every length of them."""

from __future__ import annotations

import itertools
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
Run = Callable[..., list[Any]]  # a collective in each way, on copies of its own; what each gave


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


def copied(value: Any) -> Any:
    """Tensors of their own, laid out as before."""
    if isinstance(value, list):
        return [copied(piece) for piece in value]
    return value.clone() if isinstance(value, torch.Tensor) else value


def reductions(group: Collectives, run: Run, theirs: Any, dtype: torch.dtype) -> Iterator[tuple[str, Any, Any]]:
    """(what, ours, gloo's) of everything that combines; ours in each way."""
    n, rank = group.world_size, group.rank
    for (seed, (reduction, op)), length in itertools.product(enumerate(REDUCTIONS.items()), LENGTHS):
        if not defined(reduction, dtype):
            continue
        root = (seed + LENGTHS.index(length)) % n
        # gloo's pieces are of one size: a sum over all of all stands in
        pieces = [values(seed, 10 * rank + peer, length + peer, dtype) for peer in range(n)]
        mine, sizes = values(seed, rank, length, dtype), [length, *map(len, pieces)]
        everything = torch.cat([mine, *pieces])
        dist.all_reduce(plain(everything), op, group=theirs)
        total, *scattered = everything.split(sizes)
        yield f"all_reduce {reduction} {length}", run(group.all_reduce, mine, reduction), total
        reduced = mine.clone()
        if length:
            dist.reduce(plain(reduced), group=theirs, group_dst=root, op=op)
        ours = run(group.reduce, mine, root, reduction)
        yield f"reduce {reduction} {length}", ours, reduced if rank == root else mine

        def scatter(reduction: str = reduction, pieces: list[torch.Tensor] = pieces) -> torch.Tensor:
            given = copied(pieces)
            ours = group.reduce_scatter(given, reduction)
            assert all(map(torch.equal, given, pieces))
            return ours

        yield f"reduce_scatter {reduction} {length}", run(scatter), scattered[rank]


def movements(group: Collectives, run: Run, theirs: Any, dtype: torch.dtype) -> Iterator[tuple[str, Any, Any]]:
    """(what, ours, gloo's) of everything that only moves; ours in each way."""
    n, rank = group.world_size, group.rank
    for turn, length in enumerate(LENGTHS):
        root = (turn + DTYPES.index(dtype)) % n
        mine = values(0, rank, length, dtype)
        wide = values(2, rank, 6 * length, dtype).view(3, 2 * length).t()  # not contiguous
        expected = wide.contiguous()
        dist.broadcast(plain(expected.view(-1)), group=theirs, group_src=root)
        yield f"broadcast {length}", run(group.broadcast, wide, root), expected
        found = [torch.empty_like(mine) for _ in range(n)] if rank == root else None
        dist.gather(plain(mine), plain(found), group=theirs, group_dst=root)
        yield f"gather {length}", run(group.gather, mine, root), found
        pieces = [values(4, 10 * root + peer, length, dtype) for peer in range(n)] if rank == root else None
        expected = torch.zeros_like(mine)
        dist.scatter(plain(expected), plain(pieces), group=theirs, group_src=root)
        yield f"scatter {length}", run(group.scatter, pieces, torch.zeros_like(mine), root), expected
        found = [torch.empty_like(mine) for _ in range(n)]
        dist.all_gather(plain(found), plain(mine), group=theirs)
        yield f"all_gather {length}", run(group.all_gather, mine), found

        def into(mine: torch.Tensor = mine) -> list[torch.Tensor]:
            out = [torch.empty_like(mine) for _ in range(n)]
            assert group.all_gather(mine, out) == out
            return out

        yield f"all_gather into {length}", run(into), found

        sizes = [[(length * (1 + giver) + 2 * taker) % (length + 3) for taker in range(n)] for giver in range(n)]
        pieces = [values(6, 10 * rank + peer, sizes[rank][peer], dtype) for peer in range(n)]
        expected = torch.empty(sum(sizes[peer][rank] for peer in range(n)), dtype=dtype)
        unit = 2 if dtype.is_complex else 1
        given = [unit * size for size in sizes[rank]]
        taken = [unit * sizes[peer][rank] for peer in range(n)]
        dist.all_to_all_single(plain(expected), plain(torch.cat(pieces)), taken, given, group=theirs)
        ours = [torch.cat(found) for found in run(group.all_to_all, pieces)]
        yield f"all_to_all {length}", ours, expected

        right, left = (rank + 1) % n, (rank - 1) % n

        def letter(mine: torch.Tensor = mine, right: int = right, left: int = left, tag: int = length) -> torch.Tensor:
            got = torch.empty_like(mine)
            group.send(mine, right, tag)
            assert group.recv(got, left, tag) == left
            return got

        yield f"send and recv {length}", run(letter), found[left]


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


def beside_gloo(ring: Ring, store: str) -> list[str]:
    """What differs."""
    n = ring.world_size
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=ring.rank, world_size=n)
    places: list[tuple[str, Collectives, Any]] = [("all", ring, None)]
    if n > 2:  # all but rank 0, who has a group of its own
        both = [dist.new_group([0]), dist.new_group(list(range(1, n)))]
        places.append(("some", ring.group([0] if ring.rank == 0 else range(1, n)), both[min(ring.rank, 1)]))

    def run(call: Callable[..., Any], *arguments: Any) -> list[Any]:
        own = [copied(argument) for argument in arguments]
        return [call(*own), ring.submit(call, *map(copied, arguments)).wait(90.0)]

    wrong = []
    for (where, group, theirs), dtype in itertools.product(places, DTYPES):
        if group.world_size == 1:
            continue
        for what, ways, expected in (*movements(group, run, theirs, dtype), *reductions(group, run, theirs, dtype)):
            for how, ours in zip(("directly", "in the background"), ways, strict=True):
                told = f"{what} of {dtype}, {where}, {how}"
                if not equal(ours, expected):
                    wrong.append(f"{told}: {ours} is not {expected}")
                if what.startswith("all_reduce") and ours.numel():  # to the bit, on every rank
                    first = group.broadcast(ours.clone()).view(torch.uint8)
                    if not torch.equal(ours.view(torch.uint8), first):
                        wrong.append(f"{told}, differs from rank 0's")
    ring.submit(ring.barrier).wait(90.0)
    dist.destroy_process_group()
    return wrong[:10]


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_every_collective(world_size: int, tmp_path: Path) -> None:
    # small segments, so that every algorithm comes in turn
    with ProcessRing(world_size, options={"segment_bytes": 1 << 14, "direct_bytes": 1 << 10}) as ring:
        for rank in range(world_size):
            ring.start(rank, beside_gloo, str(tmp_path / "store"))
        for rank in range(world_size):
            assert ring.result(rank, 200.0) == [], rank

"""Every operation of torch.distributed over the ring beside gloo's, element by element: by dtype, reduction and world
size; synchronous, asynchronous and in a subgroup."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.ring.test_beside_gloo import DTYPES, equal, values
from tests.torch.ranks import Here, Ranks

OP = dist.ReduceOp
REDUCTIONS = (OP.SUM, OP.AVG, OP.PRODUCT, OP.MIN, OP.MAX, OP.BAND, OP.BOR, OP.BXOR)
Filled = tuple[list[Any], list[torch.Tensor]]  # the works that fill tensors, and the tensors
Call = Callable[[Any, bool], Filled]  # of a group, and whether asynchronously


@pytest.fixture(scope="module", params=[2, 3, 4])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with Ranks(request.param, tmp_path_factory.mktemp("store") / "store") as ranks:
        yield ranks


def wait(works: list[Any]) -> None:
    for work in works:
        if work is not None:
            work.wait()


def reductions(n: int, rank: int, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    """What combines, over a group of `n` of which this is `rank`."""
    for op in REDUCTIONS:
        for length in (7, 1500):
            mine = values(int(op != OP.PRODUCT), rank, length, dtype)
            many = values(1, rank, n * length, dtype)

            def all_reduce(group: Any, later: bool, mine: torch.Tensor = mine, op: Any = op) -> Filled:
                tensor = mine.clone()
                works = [dist.all_reduce(tensor, op, group=group, async_op=later)]
                return works, [tensor]

            def coalesced(group: Any, later: bool, mine: torch.Tensor = mine, op: Any = op) -> Filled:
                tensors = [mine.clone(), mine.clone().view(1, -1)]
                works = [dist.all_reduce_coalesced(tensors, op, group=group, async_op=later)]
                return works, tensors

            def reduce(group: Any, later: bool, mine: torch.Tensor = mine, op: Any = op) -> Filled:
                tensor = mine.clone()
                works = [dist.reduce(tensor, group=group, group_dst=n - 1, op=op, async_op=later)]
                return works, [tensor] if rank == n - 1 else []

            def scatter(group: Any, later: bool, many: torch.Tensor = many, op: Any = op) -> Filled:
                out, pieces = torch.zeros_like(many[: len(many) // n]), list(many.chunk(n))
                works = [dist.reduce_scatter(out, pieces, op, group=group, async_op=later)]
                return works, [out]

            def scatter_one(group: Any, later: bool, many: torch.Tensor = many, op: Any = op) -> Filled:
                out = torch.zeros_like(many[: len(many) // n])
                works = [dist.reduce_scatter_tensor(out, many, op, group=group, async_op=later)]
                return works, [out]

            for call in (all_reduce, coalesced, reduce, scatter, scatter_one)[: None if length == 7 else 1]:
                yield f"{call.__name__} {op} {length}", call


def movements(n: int, rank: int, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    """What only moves."""
    for length in (1, 1500):
        mine = values(0, rank, length, dtype)
        many = values(2, rank, n * length, dtype)

        def broadcast(group: Any, later: bool, mine: torch.Tensor = mine) -> Filled:
            tensor = mine.clone()
            works = [dist.broadcast(tensor, group=group, group_src=n - 1, async_op=later)]
            return works, [tensor]

        def all_gather(group: Any, later: bool, mine: torch.Tensor = mine) -> Filled:
            out = [torch.zeros_like(mine) for _ in range(n)]
            works = [dist.all_gather(out, mine, group=group, async_op=later)]
            return works, out

        def all_gather_one(group: Any, later: bool, mine: torch.Tensor = mine) -> Filled:
            flat, stacked = mine.new_zeros(n * len(mine)), mine.new_zeros(n, len(mine))
            works = [dist.all_gather_into_tensor(out, mine, group=group, async_op=later) for out in (flat, stacked)]
            return works, [flat, stacked]

        def gather(group: Any, later: bool, mine: torch.Tensor = mine) -> Filled:
            out = [torch.zeros_like(mine) for _ in range(n)] if rank == 0 else None
            works = [dist.gather(mine, out, group=group, group_dst=0, async_op=later)]
            return works, out or []

        def scatter(group: Any, later: bool, many: torch.Tensor = many) -> Filled:
            out = torch.zeros_like(many[: len(many) // n])
            pieces = list(many.chunk(n)) if rank == n - 1 else None
            works = [dist.scatter(out, pieces, group=group, group_src=n - 1, async_op=later)]
            return works, [out]

        def all_to_all_single(group: Any, later: bool, many: torch.Tensor = many) -> Filled:
            even = torch.zeros_like(many)
            works = [dist.all_to_all_single(even, many, group=group, async_op=later)]
            given = [(rank + peer) % 3 for peer in range(n)]
            taken = [(peer + rank) % 3 for peer in range(n)]
            rows, uneven = values(9, rank, sum(given), dtype).view(-1, 1), many.new_zeros(sum(taken), 1)
            works += [dist.all_to_all_single(uneven, rows, taken, given, group=group, async_op=later)]
            return works, [even, uneven]

        def letters(group: Any, later: bool, mine: torch.Tensor = mine) -> Filled:
            left, right, got = (rank - 1) % n, (rank + 1) % n, torch.zeros_like(mine)
            works = [
                dist.irecv(got, group=group, group_src=left, tag=7),
                dist.isend(mine, group=group, group_dst=right, tag=7),
            ]
            return works, [got]

        for call in (broadcast, all_gather, all_gather_one, gather, scatter, all_to_all_single, letters):
            yield f"{call.__name__} {length}", call


def beside_gloo(here: Here) -> tuple[int, list[str]]:
    """How much was compared, and what differs."""
    ring, gloo = dist.group.WORLD, here.gloo
    n, rank = here.world_size, here.rank
    places: list[tuple[str, Any, Any, int, int]] = [("all", ring, gloo, n, rank)]
    if n > 2:
        few = list(range(1, n))
        part, theirs = dist.new_group(few, backend="ring"), dist.new_group(few, backend="gloo")
        if rank:
            places.append(("some", part, theirs, n - 1, rank - 1))
    compared, wrong = 0, []
    for where, ours, theirs, size, number in places:
        for dtype in DTYPES:
            calls = dict((*movements(size, number, dtype), *reductions(size, number, dtype)))
            begun, expected = {}, {}
            for what, call in calls.items():
                with contextlib.suppress(RuntimeError, ValueError):  # not for gloo, on any rank
                    begun[what] = call(theirs, True)
            for what, (works, tensors) in begun.items():
                with contextlib.suppress(RuntimeError, ValueError):
                    wait(works)
                    expected[what] = tensors
            now = {what: calls[what](ours, False) for what in expected}
            later = {what: calls[what](ours, True) for what in expected}
            for what, tensors in expected.items():
                wait(now[what][0])
                wait(later[what][0])
                compared += 1
                for how, (_, ours_are) in (("now", now[what]), ("later", later[what])):
                    if not equal(ours_are, tensors):
                        wrong.append(f"{what} of {dtype}, {where}, {how}: {ours_are} is not {tensors}")
    return compared, wrong[:5]


def test_every_operation(ranks: Ranks) -> None:
    for compared, wrong in ranks.call(beside_gloo):
        assert not wrong
        assert compared > 300  # gloo refuses some: averages of whole numbers, bits of floats


def gradients(here: Here) -> float:
    """The largest difference of gradients over the ring and over gloo, at three steps of one net."""

    def of(group: Any) -> list[torch.Tensor]:
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(8, 300), torch.nn.ReLU(), torch.nn.Linear(300, 300))
        net.append(torch.nn.BatchNorm1d(300))
        model = torch.nn.parallel.DistributedDataParallel(net, process_group=group, bucket_cap_mb=0.1)
        torch.manual_seed(here.rank)
        found = []
        for _ in range(3):
            model.zero_grad()
            model(torch.randn(16, 8)).square().sum().backward()
            found += [parameter.grad.clone() for parameter in model.parameters()]
        return found

    pairs = zip(of(dist.group.WORLD), of(here.gloo), strict=True)
    return max((ours - theirs).abs().max().item() for ours, theirs in pairs)


def test_ddp_has_the_gradients_of_gloo(ranks: Ranks) -> None:
    found = ranks.call(gradients)
    assert max(found) <= (0.0 if len(found) == 2 else 1e-4)  # of more than two the order of a sum matters

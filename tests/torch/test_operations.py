"""What gloo has not, or what shows only in how operations stand to each other: letters, order, futures, functional and
coalesced forms, objects, sparse tensors."""

from __future__ import annotations

import datetime
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional

import ringlm.torch
from tests.torch.ranks import Here, Ranks

N = 3


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with Ranks(N, tmp_path_factory.mktemp("store") / "store") as ranks:
        yield ranks


def filled(value: float, length: int = 4) -> torch.Tensor:
    return torch.full((length,), float(value))


def tags_and_any_source(here: Here) -> Any:
    if here.rank:
        for tag in (5, 6, 5):
            dist.send(filled(10 * here.rank + tag), 0, tag=tag)
        return None
    got, found = filled(0), []
    for source, tag in ((2, 6), (1, 5), (2, 5), (None, 6), (1, 5), (None, 5)):
        found.append((dist.recv(got, source, tag=tag), int(got[0])))
    return found


def receives_that_wait_beside_collectives(here: Here) -> Any:
    """A receive is begun first, and sent only after collectives that come after it, of either kind."""
    right, left = (here.rank + 1) % N, (here.rank - 1) % N
    got, total = filled(0, 300_000), filled(1)
    receive = dist.irecv(got, left, tag=1)
    later = dist.all_reduce(total, async_op=True)
    later.wait()
    dist.all_reduce(total)
    assert not receive.is_completed()
    dist.barrier()
    dist.isend(filled(here.rank, 300_000), right, tag=1).wait()
    receive.wait()
    assert receive.is_completed()
    assert receive.is_success()
    return got.unique().tolist(), total[0].item(), receive._source_rank()


def a_batch_in_any_order(here: Here) -> Any:
    """All receive first, from everybody, more than sockets hold."""
    others = [peer for peer in range(N) if peer != here.rank]
    got = {peer: filled(0, 700_000) for peer in others}
    mine = filled(here.rank, 700_000)
    operations = [dist.P2POp(dist.irecv, got[peer], peer) for peer in others]
    operations += [dist.P2POp(dist.isend, mine, peer) for peer in others]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    return all(tensor.eq(peer).all().item() for peer, tensor in got.items())


def in_order_with_futures(here: Here) -> Any:
    running, seen = filled(1), []
    first = dist.all_reduce(running, async_op=True)
    second = dist.all_reduce(running, async_op=True)
    future = second.get_future().then(lambda done: seen.append(done.value()[0][0].item()) or 7)
    dist.all_reduce(running)  # after both
    assert first.is_completed()
    assert first.result()[0] is running
    assert first.exception() is None
    assert dist.barrier(async_op=True).get_future().wait() == []
    return running[0].item(), future.wait()


def functional_forms(here: Here) -> Any:
    group, mine = dist.group.WORLD, filled(here.rank + 1, N)
    total = functional.all_reduce(mine, "sum", group) + 0
    gathered = functional.all_gather_tensor(mine, 0, group) + 0
    mean = functional.reduce_scatter_tensor(gathered, "avg", 0, group) + 0
    swapped = functional.all_to_all_single(mine, None, None, group) + 0
    first = functional.broadcast(mine, 2, group) + 0
    several = functional.all_reduce_coalesced([mine, mine[:1]], "max", group)
    gathers = functional.all_gather_into_tensor_coalesced([mine, mine[:1]], group)
    scatters = functional.reduce_scatter_tensor_coalesced([gathered, mine], "sum", [0, 0], group)
    return [t.tolist() for t in (total, gathered, mean, swapped, first, *several, *gathers, *(s + 0 for s in scatters))]


def coalesced_forms(here: Here) -> Any:
    a, b, c = filled(1), filled(2, 2), torch.ones(2, dtype=torch.int32)
    with dist.distributed_c10d._coalescing_manager():
        dist.all_reduce(a)
        dist.all_reduce(b)
        dist.all_reduce(c)
    out = [torch.zeros(N), torch.zeros(2 * N)]
    with dist.distributed_c10d._coalescing_manager(async_ops=True) as manager:
        dist.all_gather_into_tensor(out[0], filled(here.rank, 1))
        dist.all_gather_into_tensor(out[1], filled(here.rank, 2))
    manager.wait()
    parts = [torch.zeros(1), torch.zeros(2)]
    with dist.distributed_c10d._coalescing_manager():
        dist.reduce_scatter_tensor(parts[0], out[0])
        dist.reduce_scatter_tensor(parts[1], out[1])
    with dist.distributed_c10d._coalescing_manager(device=torch.device("cpu"), async_ops=True) as manager:
        dist.all_reduce(b, async_op=True)
    manager.wait()
    return [tensor.tolist() for tensor in (a, b, c, *out, *parts)]


def lists_of_any_shape(here: Here) -> Any:
    given = [torch.full((peer + 1, 2), float(here.rank)) for peer in range(N)]
    got = [torch.zeros(here.rank + 1, 2) for _ in range(N)]
    dist.all_to_all(got, given)
    assert all(piece.eq(peer).all() for peer, piece in enumerate(got))
    scalar = torch.tensor(float(here.rank))
    scalars = [torch.tensor(0.0) for _ in range(N)]
    dist.all_gather(scalars, scalar)
    transposed = torch.arange(6.0).view(2, 3).t().clone(memory_format=torch.preserve_format) * (here.rank + 1)
    dist.all_reduce(transposed)
    weights = torch.nn.Parameter(filled(here.rank))
    dist.broadcast(weights, 1)
    return [one.item() for one in scalars], transposed[1].tolist(), weights.tolist()


def dtypes_that_only_move(here: Here) -> Any:
    for dtype in (torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e4m3fnuz):
        tensor = torch.tensor([1, 2, 3]).to(dtype) if here.rank == 1 else torch.zeros(3).to(dtype)
        dist.broadcast(tensor, 1)
        assert tensor.float().tolist() == [1, 2, 3], dtype
        out = torch.zeros(N * 3).to(dtype)
        dist.all_gather_into_tensor(out, tensor)
        assert out.float().tolist() == [1, 2, 3] * N, dtype
    return True


def sparse_sums(here: Here) -> Any:
    rows = torch.tensor([[here.rank, 3]])
    mine = torch.sparse_coo_tensor(rows, torch.ones(2, 2) * (here.rank + 1), (4, 2))
    ours, theirs = mine.clone(), mine.clone()
    dist.all_reduce(ours)
    dist.all_reduce(theirs, group=here.gloo)
    return torch.equal(ours.to_dense(), theirs.to_dense())


def objects(here: Here) -> Any:
    everything: list[Any] = [None] * N
    dist.all_gather_object(everything, {"rank": here.rank})
    gathered: list[Any] | None = [None] * N if here.rank == 1 else None
    dist.gather_object(here.rank, gathered, dst=1)
    one: list[Any] = [None]
    dist.scatter_object_list(one, ["a", "b", "c"] if here.rank == 0 else None, src=0)
    said: list[Any] = [("x", 1)] if here.rank == 2 else [None]
    dist.broadcast_object_list(said, src=2)
    if here.rank == 0:
        dist.send_object_list([{"to": 1}], dst=1)
    letter: list[Any] = [None]
    if here.rank == 1:
        dist.recv_object_list(letter, src=0)
    return everything, gathered, one, said, letter


def from_two_threads(here: Here) -> Any:
    """Each with a group of its own, in no common order: a slow one does not hold the other back."""
    groups = [dist.new_group(list(range(N))) for _ in range(2)]
    sums = [filled(1), filled(1)]

    def many(which: int) -> None:
        for _ in range(20):
            dist.all_reduce(sums[which], dist.ReduceOp.AVG, group=groups[which])

    threads = [threading.Thread(target=many, args=(which,)) for which in (0, 1)]
    for thread in threads if here.rank else reversed(threads):
        thread.start()
    for thread in threads:
        thread.join(90.0)
    for group in groups:
        dist.destroy_process_group(group)
    return [one[0].item() for one in sums]


def monitored(here: Here) -> Any:
    for _ in range(2):
        ringlm.torch.monitored_barrier(timeout=datetime.timedelta(seconds=60))
    with pytest.raises(ValueError, match="not 'ring'"):
        ringlm.torch.monitored_barrier(here.gloo)
    return True


def mistakes(here: Here) -> Any:
    """Refused where they are made, and nothing has moved."""
    with pytest.raises(ValueError, match=r"'and' is not defined for torch\.float32"):
        dist.all_reduce(filled(1), dist.ReduceOp.BAND)
    with pytest.raises(ValueError, match="'and' is not defined"):
        dist.all_reduce(filled(1), dist.ReduceOp.BAND, async_op=True).wait()
    with pytest.raises(ValueError, match="4 elements cannot be divided among 3 ranks"):
        dist.all_to_all_single(filled(0), filled(0))
    group = dist.group.WORLD
    return dist.get_backend(), group.name(), group.get_group_store() is not None, dist.get_backend_config()


EXPECTED: dict[Callable[[Here], Any], Callable[[int], Any]] = {
    tags_and_any_source: lambda rank: None if rank else [(2, 26), (1, 15), (2, 25), (1, 16), (1, 15), (2, 25)],
    receives_that_wait_beside_collectives: lambda rank: ([float((rank - 1) % N)], 9.0, (rank - 1) % N),
    a_batch_in_any_order: lambda rank: True,
    in_order_with_futures: lambda rank: (27.0, 7),
    functional_forms: lambda rank: [
        [6.0] * 3,
        [1.0] * 3 + [2.0] * 3 + [3.0] * 3,
        [float(rank + 1)] * 3,
        [1.0, 2.0, 3.0],
        [3.0] * 3,
        [3.0] * 3,
        [3.0],
        [1.0] * 3 + [2.0] * 3 + [3.0] * 3,
        [1.0, 2.0, 3.0],
        [3.0 * (rank + 1)] * 3,
        [6.0],
    ],
    coalesced_forms: lambda rank: [
        [3.0] * 4,
        [18.0] * 2,
        [3, 3],
        [0.0, 1.0, 2.0],
        [0.0, 0.0, 1.0, 1.0, 2.0, 2.0],
        [3.0 * rank],
        [3.0 * rank] * 2,
    ],
    lists_of_any_shape: lambda rank: ([0.0, 1.0, 2.0], [6.0, 24.0], [1.0] * 4),
    dtypes_that_only_move: lambda rank: True,
    sparse_sums: lambda rank: True,
    objects: lambda rank: (
        [{"rank": 0}, {"rank": 1}, {"rank": 2}],
        [0, 1, 2] if rank == 1 else None,
        ["abc"[rank]],
        [("x", 1)],
        [{"to": 1}] if rank == 1 else [None],
    ),
    from_two_threads: lambda rank: [1.0, 1.0],
    monitored: lambda rank: True,
    mistakes: lambda rank: ("ring", "ring", True, "cpu:ring,cuda:ring,mps:ring"),
}


@pytest.mark.parametrize("call", EXPECTED, ids=lambda call: call.__name__)
def test_operation(ranks: Ranks, call: Callable[[Here], Any]) -> None:
    assert ranks.call(call) == [EXPECTED[call](rank) for rank in range(N)]

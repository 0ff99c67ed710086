"""CUDA tensors over the ring: the same bits as on the CPU, also where only some ranks have them, and nccl beside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.ring.helpers import contribution
from tests.torch.ranks import Here, Ranks

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
LENGTHS = (1, 1536, 65_536, 1 << 20)
DTYPES = (torch.float32, torch.bfloat16, torch.int64)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with Ranks(2, tmp_path_factory.mktemp("store") / "store", gloo=False) as ranks:
        yield ranks


def results(here: Here, device: str) -> list[torch.Tensor]:
    """What operations of both kinds make of tensors on `device`."""
    found = []
    for dtype in DTYPES:
        for length in LENGTHS:
            mine = contribution(length, here.rank, length, dtype).to(device)
            total, later = mine.clone(), mine.clone()
            dist.all_reduce(total)
            work = dist.all_reduce(later, async_op=True)
            gathered = mine.new_zeros(2 * length)
            dist.all_gather_into_tensor(gathered, mine)
            scattered = torch.zeros_like(mine)
            dist.reduce_scatter_tensor(scattered, gathered)
            future = work.get_future().then(lambda done: done.value()[0] * 2)  # on the stream of the result
            got = torch.zeros_like(mine)
            receive = dist.irecv(got, 1 - here.rank)
            dist.send(mine + 1, 1 - here.rank)
            receive.wait()
            work.wait()
            found += [total, later, gathered, scattered, future.wait(), got]
    assert all(tensor.device.type == device for tensor in found)
    return [tensor.cpu() for tensor in found]


def same_bits(here: Here, devices: tuple[str, str]) -> bool:
    ours, plain = results(here, devices[here.rank]), results(here, "cpu")
    return all(torch.equal(one, other) for one, other in zip(ours, plain, strict=True))


@pytest.mark.parametrize("devices", [("cuda", "cuda"), ("cpu", "cuda")])
def test_the_same_bits_as_on_the_cpu(ranks: Ranks, devices: tuple[str, str]) -> None:
    assert ranks.call(same_bits, devices) == [True, True]


def trained(here: Here) -> list[float]:
    """A net of which rank 0 has its copy on the CPU, rank 1 on a GPU."""
    torch.manual_seed(0)
    net = torch.nn.Linear(8, 8).to("cuda" if here.rank else "cpu")
    model = torch.nn.parallel.DistributedDataParallel(net)
    torch.manual_seed(here.rank)
    model(torch.randn(4, 8).to(net.weight.device)).square().sum().backward()
    return net.weight.grad.flatten().tolist()


def test_ddp_of_a_cpu_rank_and_a_cuda_rank(ranks: Ranks) -> None:
    one, other = ranks.call(trained)
    assert one == other


def with_nccl(here: Here, store: str) -> Any:
    """One rank, since nccl wants a GPU for each: which backend has which tensors."""
    dist.destroy_process_group()
    kept = dist.FileStore(f"{store}-{here.rank}", 1)
    dist.init_process_group("cpu:ring,cuda:nccl", store=kept, rank=0, world_size=1)
    for device in ("cpu", "cuda"):
        tensor = torch.ones(3, device=device)
        dist.all_reduce(tensor)
        work = dist.all_reduce(tensor, async_op=True)
        work.wait()
        assert tensor.tolist() == [1, 1, 1]
    group = dist.group.WORLD
    kinds = [type(group._get_backend(torch.device(device))).__name__ for device in ("cpu", "cuda")]
    dist.barrier()
    dist.destroy_process_group()
    return kinds


@pytest.mark.skipif(not dist.is_nccl_available(), reason="this torch has no NCCL")
def test_nccl_has_the_tensors_of_cuda(tmp_path: Path) -> None:
    with Ranks(2, tmp_path / "store", gloo=False) as ranks:
        assert ranks.call(with_nccl, str(tmp_path / "own")) == [["RingProcessGroup", "ProcessGroupNCCL"]] * 2

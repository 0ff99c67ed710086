"""DistributedDataParallel over the ring: every rank has the whole model and some of the data.

    torchrun --nproc-per-node 2 examples/torch/ddp.py

On two machines, in a shell on each, M being the address of the first as the second reaches it:

    torchrun --nnodes 2 --node-rank 0 --nproc-per-node 1 --master-addr M --master-port 29500 examples/torch/ddp.py
    torchrun --nnodes 2 --node-rank 1 --nproc-per-node 1 --master-addr M --master-port 29500 examples/torch/ddp.py
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def main() -> None:
    dist.init_process_group("ring")  # ringlm is installed, so torch knows it
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same data everywhere; each rank takes its part
    inputs = torch.randn(240, 8)
    targets = inputs.square().sum(1, keepdim=True)
    model = DistributedDataParallel(
        torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for step in range(100):
        optimizer.zero_grad()
        loss = (model(inputs[rank::world_size]) - targets[rank::world_size]).square().mean()
        loss.backward()  # sums of gradients go on meanwhile
        optimizer.step()
        if step % 33 == 0:
            dist.all_reduce(loss.detach_(), dist.ReduceOp.AVG)
            if rank == 0:
                print(f"step {step}: loss {loss.item():.4f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

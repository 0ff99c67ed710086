"""A DeviceMesh over the ring: rows of ranks and columns of ranks, each a group of its own.

torchrun --nproc-per-node 4 examples/torch/mesh.py
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor


def main() -> None:
    dist.init_process_group("ring")
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replica", "shard"))
    row = torch.tensor([float(dist.get_rank())])
    column = row.clone()
    dist.all_reduce(row, group=mesh.get_group("shard"))
    dist.all_reduce(column, group=mesh.get_group("replica"))
    whole = torch.arange(16.0).view(4, 4)
    tensor = distribute_tensor(whole, mesh, [Replicate(), Shard(0)])
    product = (tensor @ tensor).redistribute(placements=[Shard(1), Replicate()]).full_tensor()
    same = torch.equal(product, whole @ whole)
    print(f"rank {dist.get_rank()}: row {row.item():g}, column {column.item():g}, product: {same}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

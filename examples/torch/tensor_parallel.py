"""DTensor over the ring: every rank has a part of each layer.

torchrun --nproc-per-node 2 examples/torch/tensor_parallel.py
"""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module


def main() -> None:
    dist.init_process_group("ring")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    torch.manual_seed(0)
    whole = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Linear(64, 16))
    model = parallelize_module(copy.deepcopy(whole), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    inputs = torch.randn(5, 16)
    outputs = model(inputs)
    outputs.sum().backward()
    whole(inputs).sum().backward()
    held = sum(parameter.to_local().numel() for parameter in model.parameters())
    same = torch.allclose(outputs, whole(inputs), atol=1e-5) and all(
        torch.allclose(mine.grad.full_tensor(), theirs.grad, atol=1e-5)
        for mine, theirs in zip(model.parameters(), whole.parameters(), strict=True)
    )
    print(f"rank {dist.get_rank()}: {held} parameters here; as on one process: {same}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""FSDP2 over the ring, on the CPU: every rank keeps a part of parameters and optimizer; a checkpoint of the whole.

torchrun --nproc-per-node 2 examples/torch/fsdp.py [FOLDER]
"""

from __future__ import annotations

import copy
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def sharded(whole: torch.nn.Module) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = copy.deepcopy(whole)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        if isinstance(layer, torch.nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, inputs: torch.Tensor) -> float:
    for _ in range(10):
        loss = (model(inputs) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def main() -> None:
    dist.init_process_group("ring")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    folder = [sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    torch.manual_seed(0)
    whole = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
    inputs = torch.randn(8 * world_size, 16)
    model, optimizer = sharded(whole)
    train(model, optimizer, inputs[8 * rank : 8 * rank + 8])
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    checkpoint.save(state, checkpoint_id=folder[0])

    again, its_optimizer = sharded(whole)  # from the checkpoint, which any number of ranks could read
    state = dict(zip(("model", "optimizer"), get_state_dict(again, its_optimizer), strict=True))
    checkpoint.load(state, checkpoint_id=folder[0])
    set_state_dict(again, its_optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    same = train(model, optimizer, inputs) == train(again, its_optimizer, inputs)

    alone = torch.optim.AdamW(whole.parameters(), lr=0.01)
    train(whole, alone, inputs)
    train(whole, alone, inputs)
    close = all(
        torch.allclose(mine.full_tensor(), theirs, atol=1e-4)
        for mine, theirs in zip(model.parameters(), whole.parameters(), strict=True)
    )
    print(f"rank {rank}: goes on from its checkpoint: {same}; as on one process: {close}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

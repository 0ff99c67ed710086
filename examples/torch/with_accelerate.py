"""accelerate over the ring: its Accelerator finds the group that is there already.

accelerate launch --cpu --num_processes 2 examples/torch/with_accelerate.py, or torchrun as of the others.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset


def main() -> None:
    os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    dist.init_process_group("ring")
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    inputs = torch.randn(64, 4)
    data = DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_size=8)
    model = torch.nn.Linear(4, 1)
    model, optimizer, data = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), data)
    for _ in range(20):
        for batch, target in data:
            optimizer.zero_grad()
            loss = (model(batch) - target).square().mean()
            accelerator.backward(loss)
            optimizer.step()
    losses = accelerator.gather(loss.detach()[None])
    backend = dist.get_backend()
    accelerator.print(
        f"{accelerator.num_processes} processes over {backend}: loss {losses.mean().item():.6f}", flush=True
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

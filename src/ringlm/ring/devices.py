"""Between a device's memory and the host's: all that the ring knows of CUDA and MPS.

Sockets carry host memory. A tensor of a GPU is copied to pinned host memory on its current stream, with
one synchronization for all tensors of a call, and back the same way, with none: what uses the result
follows on that stream, and torch's allocator keeps pinned memory until its copy is done. MPS takes the
same way with memory that is not pinned; this has not been run on Metal.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch


class Staging:
    """Host memory for the elements of tensors. What touches a device is in the methods at the end."""

    def host(self, tensor: torch.Tensor) -> torch.Tensor:
        """The elements, flat and contiguous in host memory: the tensor's own where they are so already."""
        if (
            self.in_host_memory(tensor)
            and tensor.is_contiguous()
            and not (tensor.requires_grad or tensor.is_neg() or tensor.is_conj())
        ):
            return tensor if tensor.dim() == 1 else tensor.view(-1)
        return self.take([tensor])[0]

    def take(self, tensors: Sequence[torch.Tensor], read: bool = True) -> list[torch.Tensor]:
        """Like `host`, of several, in one synchronization; with `read` False elements that are copied are not
        set, for memory that is about to be filled."""
        flats, devices = [], set()
        for tensor in tensors:
            plain = not (tensor.requires_grad or tensor.is_neg() or tensor.is_conj())
            if self.in_host_memory(tensor) and plain and tensor.is_contiguous():
                flats.append(tensor.view(-1))
                continue
            flat = self.empty(tensor.numel(), tensor)
            if read:
                self.copy(flat.view(tensor.shape), tensor.detach())
                if not self.in_host_memory(tensor):
                    devices.add(tensor.device)
            flats.append(flat)
        for device in devices:
            self.synchronize(device)
        return flats

    def give(self, tensor: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
        """`tensor`, with the elements of `flat` if those lie elsewhere."""
        if flat.data_ptr() != tensor.data_ptr():
            self.copy(tensor.detach(), flat.view(tensor.shape))
        return tensor

    # -- the devices ---------------------------------------------------------------------------

    def in_host_memory(self, tensor: torch.Tensor) -> bool:
        """Whether a socket can reach the elements."""
        return tensor.is_cpu

    def empty(self, length: int, like: torch.Tensor) -> torch.Tensor:
        """Host memory for `length` elements of `like`'s dtype, pinned where its device is a GPU of CUDA."""
        return torch.empty(length, dtype=like.dtype, pin_memory=like.is_cuda)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy; between CUDA and host memory it is only under way when this returns."""
        target.copy_(source, non_blocking=target.is_cuda or source.is_cuda)

    def synchronize(self, device: torch.device) -> None:
        """Wait for the copies of the current stream."""
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        elif device.type == "mps":
            torch.mps.synchronize()


def mark_streams() -> list[torch.cuda.Event]:
    """What is on this thread's current streams now, for `follow`."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return []
    return [torch.cuda.current_stream(index).record_event() for index in range(torch.cuda.device_count())]


def follow(marks: Sequence[torch.cuda.Event]) -> None:
    """What comes on this thread's current streams waits for what was marked, which may be on others."""
    for index, mark in enumerate(marks):
        torch.cuda.current_stream(index).wait_event(mark)


def streams_of_caller() -> list[AbstractContextManager[object]]:
    """What makes another thread's work part of this thread's current streams: enter these there."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return []
    return [torch.cuda.stream(torch.cuda.current_stream(index)) for index in range(torch.cuda.device_count())]

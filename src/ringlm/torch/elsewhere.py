"""What "cpu:ring,cuda:nccl" means: tensors of some devices are another backend's.

Torch knows which only after it has made the group, and then asks this group for everything; so a group of the other
backend is made here, at its first use, which is one on all ranks.
"""

from __future__ import annotations

import datetime
import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed import ProcessGroup

from ringlm.errors import ConfigError

_Method = TypeVar("_Method", bound=Callable[..., Any])


def backends(owner: ProcessGroup) -> dict[str, str]:
    """By type of device; of a group that is still being made the CPU's alone."""
    try:
        pairs = dist.get_backend_config(owner).split(",")
    except (AssertionError, ValueError):
        return {"cpu": "ring"}
    return dict(pair.split(":") for pair in pairs)


def group(
    owner: ProcessGroup, device: str, known: dict[str, ProcessGroup | None], store: Store, timeout: datetime.timedelta
) -> ProcessGroup | None:
    """The group that has `owner`'s tensors on a type of device; None: `owner` itself. `known` remembers them."""
    if device in known:
        return known[device]
    configured = backends(owner)
    name = configured.get(device, "ring")
    found = None if name == "ring" else _make(name, device, owner, PrefixStore(f"ringlm {device}", store), timeout)
    if device in configured:
        known[device] = found
    return found


def other_devices(method: _Method) -> _Method:
    """The method of a RingProcessGroup, or of the group that has the tensors which it is given."""

    @functools.wraps(method)
    def routed(self: Any, *arguments: Any, **options: Any) -> Any:
        tensor = _first(arguments)
        if tensor is None or tensor.is_cpu or (other := self._other(tensor.device.type)) is None:
            return method(self, *arguments, **options)
        return getattr(other, method.__name__)(*arguments, **options)

    return routed  # type: ignore[return-value]


def _first(arguments: Iterable[Any]) -> torch.Tensor | None:
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            return argument
        if isinstance(argument, list) and (found := _first(argument)) is not None:
            return found
    return None


def _make(name: str, device: str, owner: ProcessGroup, store: Store, timeout: datetime.timedelta) -> ProcessGroup:
    backend: Any
    if name == "nccl" and dist.is_nccl_available():
        nccl: Any = dist.ProcessGroupNCCL  # not in every build
        options = nccl.Options()
        options._timeout = timeout
        backend, kind = nccl(store, owner.rank(), owner.size(), options), ProcessGroup.BackendType.NCCL
    elif name == "gloo" and dist.is_gloo_available():
        gloo: Any = dist.ProcessGroupGloo
        backend, kind = gloo(store, owner.rank(), owner.size(), timeout=timeout), ProcessGroup.BackendType.GLOO
    else:
        raise ConfigError(f"{device}:{name} cannot stand beside the backend 'ring' here; gloo and nccl can.")
    made = ProcessGroup(store, owner.rank(), owner.size())
    made._set_default_backend(kind)
    made._register_backend(torch.device(device), kind, backend)
    made._set_group_name(owner.group_name)
    return made

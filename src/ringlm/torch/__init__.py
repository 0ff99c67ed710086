"""The ring as a backend of torch.distributed: `init_process_group("ring")`, for CPU, CUDA and MPS tensors.

Importing this registers it; where ringlm is installed torch does so by itself, through the entry point `autoload`.
Nothing but torch is imported before a group is made.
"""

from __future__ import annotations

import datetime
import warnings
from typing import Any

import torch.distributed as dist

__all__ = ["autoload", "monitored_barrier"]

_DEVICES = ["cpu", "cuda", "mps"]


def autoload() -> None:
    """What torch calls at the end of `import torch`: an exception here would break that everywhere."""
    try:
        _register()
    except Exception as error:  # noqa: BLE001  whatever a future torch objects to
        warnings.warn(f"the torch.distributed backend 'ring' cannot be had here: {error}", stacklevel=2)


def monitored_barrier(
    group: dist.ProcessGroup | None = None, timeout: datetime.timedelta | None = None, wait_all_ranks: bool = False
) -> None:
    """torch.distributed.monitored_barrier, which torch refuses for any backend but gloo.

    Returns once all ranks have called it. Raises CollectiveTimeoutError that names the first rank that is not here
    after `timeout`, on all ranks, and with `wait_all_ranks` all of them; the group has ended then.
    """
    from ringlm.torch.process_group import RingProcessGroup

    found = group or dist.group.WORLD
    if not isinstance(found, RingProcessGroup):
        raise ValueError("this group's backend is not 'ring'; use torch.distributed.monitored_barrier.")
    found.monitored_barrier(timeout, wait_all_ranks)


def _register() -> None:
    if dist.is_available() and "ring" not in dist.Backend.backend_list:
        dist.Backend.register_backend("ring", _create, extended_api=True, devices=_DEVICES)


def _create(options: Any, _: Any) -> dist.ProcessGroup:
    """What torch calls for every new group. `options` are torch's DistributedBackendOptions."""
    from ringlm.torch.process_group import RingProcessGroup
    from ringlm.torch.rendezvous import meet

    ring = meet(options.store, options.group_rank, options.group_size, options.timeout.total_seconds())
    return RingProcessGroup(ring, options.store, options.timeout, options.global_ranks_in_group)


autoload()

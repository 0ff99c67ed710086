"""How many threads a rank should compute with."""

from __future__ import annotations

import os
from pathlib import Path


def physical_cores() -> int:
    """Cores this process may use, counting hyper-threads of one core once (elsewhere than Linux: all)."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    groups = set()
    for cpu in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        groups.add(siblings.read_text() if siblings.exists() else str(cpu))
    return len(groups)


def threads_for(local_ranks: int) -> int:
    """An equal share of the cores for each of the ranks on this machine, one at least."""
    return max(1, physical_cores() // local_ranks)

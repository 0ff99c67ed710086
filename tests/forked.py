"""What every process of `tests.processes` begins with: torch, and the compiled code of small sums."""

from __future__ import annotations

import torch

from tests.ring.helpers import each, thread_ring

with thread_ring(2) as rings:
    each(rings, lambda ring: ring.all_reduce(torch.ones(1)))

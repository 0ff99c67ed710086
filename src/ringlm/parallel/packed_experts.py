"""Packed experts on the CPU: a few tokens go through all of theirs in one call of compiled code, since the calls for
each expert by itself would take a good part of the time that reading it takes. Knows the shard's columns, no files."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ringlm.parallel.experts import Expert, Experts, Routes
from ringlm.parallel.kernels.experts import mix, route_bytes
from ringlm.parallel.packed import PackedMatrix, Plan, Workspace
from ringlm.parallel.prologue import Gate


class PackedExperts(Experts):
    """Experts whose matrices are `PackedMatrix`."""

    def __init__(self, experts: Sequence[Expert], gate: Gate, workspace: Workspace) -> None:
        super().__init__(experts, gate)
        self._workspace, self._threads = workspace, torch.get_num_threads()

    def __call__(self, x: Tensor, routes: Routes) -> Tensor:
        tokens, chosen = routes.experts.shape
        if tokens >= self._workspace.unpack_from:  # an expert may get so many that unpacking is faster
            return super().__call__(x, routes)
        exact = x.float().contiguous()
        out = torch.zeros(x.shape)
        plans, route_bytes = self._prepared
        work = self._workspace.address(tokens * chosen * route_bytes + (len(plans) + 1) * 8)
        mix(
            self._threads, plans.data_ptr(), len(plans), exact.data_ptr(), tokens, chosen,
            routes.weights.data_ptr(), routes.experts.data_ptr(), work, out.data_ptr(),
        )  # fmt: skip
        return out.to(x.dtype)

    @functools.cached_property
    def _prepared(self) -> tuple[Tensor, int]:
        """The addresses of every expert's plans, int64 (experts, 2), and the bytes that a route needs to work in."""
        plans = [self._plans(expert) for expert in self.experts]
        addresses = torch.tensor([[plan.address for plan in both] for both in plans])
        return addresses, route_bytes(*(plan.words for plan in plans[0]))

    def _plans(self, expert: Expert) -> tuple[Plan, Plan]:
        assert isinstance(expert.gate_up, PackedMatrix)
        assert isinstance(expert.down, PackedMatrix)
        return expert.gate_up.plan(None), expert.down.plan(self.gate)

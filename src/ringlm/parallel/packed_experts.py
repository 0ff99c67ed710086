"""Packed experts on the CPU: a few tokens are normed and routed by one call of compiled code and go through all of
their experts by another, since torch's calls for each part take a good part of the time that reading experts takes.
Knows the shard's columns, no files."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ringlm.parallel.experts import Expert, Experts, Router, Routes
from ringlm.parallel.kernels.dense import KINDS
from ringlm.parallel.kernels.experts import mix, route_bytes
from ringlm.parallel.kernels.routing import route, routing_bytes
from ringlm.parallel.packed import PackedMatrix, Plan, Workspace
from ringlm.parallel.prologue import Gate, RmsNorm


class PackedExperts(Experts):
    """Experts whose matrices are `PackedMatrix`."""

    def __init__(self, experts: Sequence[Expert], gate: Gate, workspace: Workspace) -> None:
        super().__init__(experts, gate)
        self._workspace, self._threads = workspace, torch.get_num_threads()
        self._routers: dict[Router, tuple[Tensor, Tensor]] = {}  # words for the kernel, and the norm's weight

    def __call__(self, x: Tensor, routes: Routes) -> Tensor:
        tokens, chosen = routes.experts.shape
        if tokens >= self._workspace.unpack_from:  # an expert may get so many that unpacking is faster
            return super().__call__(x, routes)
        exact = x.float().contiguous()
        work = self._workspace.address(self._work_bytes(tokens, chosen))
        weights, choices = routes.weights.data_ptr(), routes.experts.data_ptr()
        return self._mix(exact.data_ptr(), weights, choices, work, chosen, x)

    def of_norm(self, norm: RmsNorm, router: Router, residual: Tensor) -> Tensor:
        tokens, size = residual.shape
        if tokens >= self._workspace.unpack_from:
            return super().of_norm(norm, router, residual)
        exact = residual.contiguous()
        words, _ = self._routers.get(router) or self._words(norm, router)
        room = routing_bytes(tokens, size, len(self.experts), router.chosen)
        work = self._workspace.address(room + self._work_bytes(tokens, router.chosen))
        x, weights, choices, work = route(words.data_ptr(), norm.eps, exact.data_ptr(), tokens, work)
        return self._mix(x, weights, choices, work, router.chosen, residual)

    def _mix(self, x: int, weights: int, choices: int, work: int, chosen: int, like: Tensor) -> Tensor:
        """What `mix` makes of what is at these addresses, of the shape and dtype of `like`."""
        out, (plans, _) = torch.empty(like.shape), self._prepared
        mix(self._threads, plans.data_ptr(), len(plans), x, len(like), chosen, weights, choices, work, out.data_ptr())
        return out.to(like.dtype)

    def _work_bytes(self, tokens: int, chosen: int) -> int:
        return tokens * chosen * self._prepared[1] + (len(self.experts) + 1) * 8

    def _words(self, norm: RmsNorm, router: Router) -> tuple[Tensor, Tensor]:
        """What `route` is to do."""
        matrix, weight = router.matrix.weight, norm.weight.float()
        head = [len(self.experts), router.chosen, int(router.normalized), matrix.shape[1], weight.data_ptr()]
        words = torch.tensor([*head, KINDS.index(matrix.dtype), matrix.data_ptr()])
        found = self._routers[router] = words, weight
        return found

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

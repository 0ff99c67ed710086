"""Mixtures of experts: a router, which every rank holds whole, and experts, of whose columns each rank holds some, so
that ranks do equal work whatever is chosen. Knows no files and no model.

Every token goes through the few experts that the router gives the most weight, and nothing is read of an expert that no
token goes through. The ranks' partial results are reduced once for all experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ringlm.parallel.communicator import Communicator
from ringlm.parallel.linear import Dense, Storage
from ringlm.parallel.prologue import Gate, RmsNorm


class Expert(NamedTuple):
    """One MLP: `gate_up` (2 * this rank's columns, in), gates first, and `down` (in, this rank's columns)."""

    gate_up: Storage
    down: Storage


class Routes(NamedTuple):
    """Where tokens go."""

    weights: Tensor  # (T, chosen) float32
    experts: Tensor  # (T, chosen) int64, each once a token


class Router:
    """Softmax over the scores of all experts, of which the `chosen` largest are taken; `normalized`: these sum to 1."""

    def __init__(self, matrix: Dense, chosen: int, normalized: bool) -> None:
        self.matrix, self.chosen, self.normalized = matrix, chosen, normalized

    def __call__(self, x: Tensor) -> Routes:
        """x (T, in)."""
        weights, experts = self.matrix(x).float().softmax(-1).topk(self.chosen)
        return Routes(weights.div_(weights.sum(-1, keepdim=True)) if self.normalized else weights, experts)


class Experts:
    """The experts of one layer, all of one shape."""

    def __init__(self, experts: Sequence[Expert], gate: Gate) -> None:
        self.experts, self.gate = experts, gate

    def __call__(self, x: Tensor, routes: Routes) -> Tensor:
        """x (T, in) to the weighted sum of its experts' results, as far as this rank's columns give it (T, in)."""
        chosen = routes.experts.flatten()
        order = chosen.argsort(stable=True)
        tokens, weights = order // routes.experts.shape[1], routes.weights.flatten()[order].unsqueeze(1)
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        start = 0
        for expert, count in zip(self.experts, chosen.bincount(minlength=len(self.experts)).tolist(), strict=True):
            if count:
                mine = slice(start, start + count)
                result = expert.down(expert.gate_up(x[tokens[mine]]), None, self.gate)
                out.index_add_(0, tokens[mine], result * weights[mine])
                start += count
        return out.to(x.dtype)

    def of_norm(self, norm: RmsNorm, router: Router, residual: Tensor) -> Tensor:
        """The mixture, by `router`, of the norm of residual, float32 (T, in), as far as this rank's columns give it:
        float32 (T, in)."""
        x = norm(residual)
        return self(x, router(x))


class MixtureOfExperts:
    """Norm, router and experts; the sum over ranks goes into the residual.

    With `led`, rank 0 routes for all: where ranks compute on different hardware, norms may differ in the last bit, and
    with them close choices.
    """

    def __init__(self, norm: RmsNorm, router: Router, experts: Experts, comm: Communicator, led: bool) -> None:
        self.norm, self.router, self.experts, self.comm = norm, router, experts, comm
        self.led = led and comm.world_size > 1

    def add_to(self, residual: Tensor) -> None:
        """residual, float32 (T, in), += the mixture of its norm."""
        if self.led:
            x = self.norm(residual)
            mixed = self.experts(x, self._routes_of_rank_0(x))
        else:
            mixed = self.experts.of_norm(self.norm, self.router, residual)
        residual.add_(self.comm.all_reduce(mixed.to(self.norm.weight.dtype)))

    def _routes_of_rank_0(self, x: Tensor) -> Routes:
        data = None
        if self.comm.rank == 0:
            weights, experts = self.router(x)
            data = torch.stack((weights, experts.float())).cpu().numpy().tobytes()  # small integers are exact
        sent = torch.frombuffer(bytearray(self.comm.broadcast_bytes(data)), dtype=torch.float32).to(x.device)
        weights, experts = sent.view(2, x.shape[0], self.router.chosen)
        return Routes(weights, experts.long())

"""Norms and gates, compiled or by torch, against what they stand for in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ringlm.parallel.prologue import Gate, RmsNorm, norm_heads


@pytest.mark.parametrize("columns", [1, 7, 8, 50])
@pytest.mark.parametrize("rows", [1, 3])
def test_gates(columns: int, rows: int) -> None:
    wide = torch.randn(rows, 2 * columns + 3) * 3
    wide[0, 0], wide[-1, columns - 1] = 300.0, -300.0
    x = wide[:, : 2 * columns]  # rows that are not side by side
    gate, up = x.double().chunk(2, 1)
    for found, exact in (
        (Gate()(x), F.silu(gate) * up),
        (Gate(gelu=True)(x), F.gelu(gate, approximate="tanh") * up),
        (Gate()(x.double()), F.silu(gate) * up),
        (Gate(gelu=True)(x.double()), F.gelu(gate, approximate="tanh") * up),
    ):
        torch.testing.assert_close(found.double(), exact, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_of_heads_in_place(tokens: int, dtype: torch.dtype) -> None:
    heads = torch.randn(tokens, 37).to(dtype)[:, :30].view(tokens, 5, 6)  # tokens that are not side by side
    before = heads.double()
    queries, keys = (RmsNorm(torch.rand(6) + 0.5, 1e-6) for _ in range(2))  # float32, as 1 + a weight is
    norm_heads(queries, 2, keys, 1, heads)
    for norm, mine in ((queries, slice(0, 2)), (keys, slice(2, 3))):
        exact = F.rms_norm(before[:, mine], (6,), norm.weight.double(), 1e-6)
        torch.testing.assert_close(heads[:, mine], exact.to(dtype))
    assert torch.equal(heads[:, 3:].double(), before[:, 3:])


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_is_added(tokens: int, dtype: torch.dtype) -> None:
    norm = RmsNorm(torch.rand(50).to(dtype), 1e-6)
    x = torch.randn(tokens, 57).to(dtype)[:, :50]
    for residual in (torch.randn(tokens, 50).to(dtype), torch.randn(tokens, 60).to(dtype)[:, :50]):
        exact = residual.double() + F.rms_norm(x.double(), (50,), norm.weight.double(), 1e-6)
        norm.add_to(residual, x)
        rounding = 2e-2 if dtype is torch.bfloat16 else 1e-5
        torch.testing.assert_close(residual.double(), exact, rtol=rounding, atol=rounding)

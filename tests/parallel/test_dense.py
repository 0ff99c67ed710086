"""Products of unpacked matrices with a few activations: torch's to rounding, and each row's bits its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ringlm.parallel.kernels.dense import KINDS, product
from ringlm.parallel.linear import Dense


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 7), (8, 16), (37, 45), (64, 100), (0, 16), (9, 0)])
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 7])
def test_as_torch_has_it(dtype: torch.dtype, rows: int, columns: int, tokens: int) -> None:
    generator = torch.Generator().manual_seed(rows * columns + tokens)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    x = torch.randn(tokens, columns, generator=generator).to(dtype)
    torch.testing.assert_close(product(weight, x), F.linear(x.float(), weight.float()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", KINDS)
def test_a_rows_bits_are_the_same_whatever_is_computed_beside_it(dtype: torch.dtype) -> None:
    weight, x = torch.randn(21, 83).to(dtype), torch.randn(7, 83).to(dtype)
    together = product(weight, x)
    for row in range(7):
        assert torch.equal(product(weight, x[row : row + 1])[0], together[row])


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("tokens", [1, 33])
def test_a_layer_adds_its_bias_and_takes_parts_of_matrices_and_activations(dtype: torch.dtype, tokens: int) -> None:
    weight, x, bias = torch.randn(20, 64).to(dtype), torch.randn(tokens, 64).to(dtype), torch.randn(20).to(dtype)
    found = Dense(weight[:, 8:41])(x[:, 8:41], bias)
    assert found.dtype is dtype
    exact = F.linear(x[:, 8:41].double(), weight[:, 8:41].double(), bias.double())
    torch.testing.assert_close(found.double(), exact, rtol=2e-2 if dtype.itemsize == 2 else 1e-5, atol=2e-2)


def test_numbers_that_are_none_are_kept() -> None:
    weight, x = torch.ones(9, 20), torch.ones(1, 20)
    weight[3, 4], weight[5, 6] = torch.inf, torch.nan
    found = product(weight, x)
    assert found[0, 3] == torch.inf
    assert found[0, 5].isnan()
    assert found[0, 8] == 20


AGAIN = """
import json, sys, torch
from ringlm.parallel.kernels.dense import KINDS, product
for threads, kinds in json.loads(sys.argv[1]):
    torch.set_num_threads(threads)
    for kind in kinds:
        weight, x = torch.randn(37, 45).to(KINDS[kind]), torch.randn(3, 45)
        torch.testing.assert_close(product(weight, x), x @ weight.float().T, rtol=1e-5, atol=1e-5)
"""


@pytest.mark.parametrize(
    "processes",
    [[[(1, (0, 1, 2)), (2, (0, 1, 2))]] * 2, [[(1, (1,))], [(1, (0,))], [(2, (0, 1, 2))], [(2, (2, 1, 0))]]],
    ids=["all", "one kind each"],
)
def test_what_was_compiled_before_is_right_in_the_next_process(processes: list[object], tmp_path: Path) -> None:
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "2"}
    for each in processes:
        subprocess.run([sys.executable, "-c", AGAIN, json.dumps(each)], env=environment, check=True, timeout=100)

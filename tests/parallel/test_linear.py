"""Sharded layers add up to the whole ones."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ringlm.parallel.communicator import Alone
from ringlm.parallel.linear import ColumnParallel, Dense, RowParallel, VocabularyParallel
from ringlm.parallel.shard import Range
from tests.parallel.local import run_ranks

CUTS = {1: [0, 20], 2: [0, 13, 20], 3: [0, 7, 7, 20], 4: [0, 0, 5, 20, 20]}


@pytest.fixture(params=CUTS)
def parts(request: pytest.FixtureRequest) -> list[Range]:
    cuts = CUTS[request.param]
    return [Range(start, stop) for start, stop in itertools.pairwise(cuts)]


def test_row_parallel_reduces_once_and_adds_its_bias_once(parts: list[Range]) -> None:
    weight, bias, x, residual = torch.randn(6, 20), torch.randn(6), torch.randn(3, 20), torch.randn(3, 6)

    def body(comm: Any) -> torch.Tensor:
        part, mine = parts[comm.rank], residual.clone()
        RowParallel(Dense(weight[:, part.slice]), bias, comm).add_to(mine, x[:, part.slice])
        assert comm.calls == {"all_reduce": 1}
        return mine

    results = run_ranks(len(parts), body)
    assert all(torch.equal(result, results[0]) for result in results)
    torch.testing.assert_close(results[0], residual + F.linear(x, weight, bias))


def test_column_parallel_outputs_lie_side_by_side(parts: list[Range]) -> None:
    weight, bias, x = torch.randn(20, 6), torch.randn(20), torch.randn(3, 6)
    outputs = [ColumnParallel(Dense(weight[part.slice]), bias[part.slice])(x) for part in parts]
    torch.testing.assert_close(torch.cat(outputs, 1), F.linear(x, weight, bias))


def test_vocabulary_parallel_finds_each_token_on_one_rank(parts: list[Range]) -> None:
    weight = torch.randn(20, 6)
    weight[3] = torch.inf  # another rank's row must not turn into 0 * inf
    tokens = torch.tensor([0, 19, 7, 12, 13, 5, 0])

    def body(comm: Any) -> torch.Tensor:
        rows = parts[comm.rank]
        return VocabularyParallel(Dense(weight[rows.slice]), rows, comm)(tokens)

    for result in run_ranks(len(parts), body):
        assert torch.equal(result, weight[tokens])


def test_a_world_of_one_copies_nothing() -> None:
    alone, tensor = Alone(), torch.ones(2, 2)
    assert alone.all_reduce(tensor) is tensor
    gathered = alone.gather(tensor)
    assert gathered is not None
    assert gathered[0] is tensor
    assert alone.broadcast_bytes(b"x") == b"x"
    assert alone.gather_bytes(b"x") == [b"x"]

"""Quantized folders answer as the unquantized model that they stand for, at any world size, unpacked and packed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ringlm.models.config import read_config
from ringlm.models.sizes import holdings
from ringlm.parallel.shard import plan_shards
from ringlm.weights import open_model
from tests.models.reference import assert_same, expected, prompt, ring_greedy
from tests.models.test_packing import apart, logits, on_accelerators
from tests.models.test_sizes import held, loaded
from tests.weights.write_quantized import METHODS, write

# How far a packed one's logits may be from the unquantized one's, with activations that are not rounded. Packing rounds
# to 8 bits what the folder has in floats, such as the embedding, but for MLX's, and codes that cannot be kept.
APART = {"gptq with zeros": 0.03, "awq": 0.03, "gptq by activations": 0.06, "fp8 by blocks": 0.06, "mlx": 1e-5}


@pytest.fixture(scope="module", params=APART)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def pair(name: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A quantized folder and its unquantized counterpart."""
    return write(tmp_path_factory.mktemp("quantized"), METHODS[name])


def test_unpacked(pair: tuple[Path, Path]) -> None:
    quantized, truth = pair
    prompts = [prompt(20), prompt(5, seed=1)]
    theirs = expected(truth, prompts, 8)
    for world_size in (1, 3):
        assert_same(ring_greedy(quantized, world_size, prompts, 8), theirs)


def test_packed(name: str, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    files = open_model(pair[0])
    exact = logits(open_model(pair[1]), 1, [40])
    for world_size in (1, 3):
        assert apart(logits(files, world_size, [38, 1, 1], bits=8), exact) < 0.06
    monkeypatch.setattr("ringlm.models.loader.layout_of", on_accelerators)
    for world_size in (1, 3):
        found = logits(files, world_size, [38, 1, 1], bits=8, device=torch.device("cpu"))
        assert apart(found, exact) < APART[name]


@pytest.mark.parametrize("bits", [None, 4])
def test_what_is_planned_is_what_is_held(pair: tuple[Path, Path], bits: int | None) -> None:
    files = open_model(pair[0])
    plan = plan_shards(read_config(files.config), 3)
    planned = holdings(files, plan, ["cpu"] * 3, dtype="float32", bits=bits)
    assert held(planned) == loaded(files, 3, None, "float32", bits)

"""What is special about mixtures of experts: how files name them, what a step sends, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ringlm.errors import ModelError
from ringlm.models.batch import Batch
from ringlm.models.config import read_config
from ringlm.parallel.communicator import Alone
from ringlm.weights import open_model
from tests.models.reference import assert_same, expected, generate, load, prompt, ring_greedy, save
from tests.parallel.local import run_ranks

EXPERTS = {"num_experts": 7, "num_experts_per_tok": 2, "moe_intermediate_size": 21}
PROMPTS = [prompt(20)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3-MoE."""
    return save(tmp_path_factory.mktemp("mixture") / "qwen", family="Qwen3Moe", norm_topk_prob=True, **EXPERTS)


def test_a_step_reduces_as_often_as_without_experts(folder: Path) -> None:
    files = open_model(folder)

    def calls(comm: Any, led: bool) -> dict[str, int]:
        model = load(files, comm, led=led)
        model.forward(Batch.of([(prompt(9), 0, [0])], [8]), model.new_cache(1))
        return dict(comm.calls)

    assert run_ranks(3, lambda comm: calls(comm, False)) == [{"all_reduce": 2 * 2 + 1}] * 3
    assert run_ranks(3, lambda comm: calls(comm, True)) == [{"all_reduce": 2 * 2 + 1, "broadcast_bytes": 2}] * 3


@pytest.mark.parametrize("weights", [(2.0, 1.0), (1.0, 0.0), (0.0, 1.0, 3.0)])
def test_unequal_splits(folder: Path, weights: tuple[float, ...]) -> None:
    files = open_model(folder)
    theirs = expected(folder, PROMPTS, 8)
    assert_same(ring_greedy(folder, len(weights), PROMPTS, 8, weights=weights), theirs)

    def packed(comm: Any) -> torch.Tensor:
        return generate(load(files, comm, weights, bits=8), comm, PROMPTS, 1)[0].logits[0]

    for ours in run_ranks(len(weights), packed):
        assert torch.cosine_similarity(ours, theirs[0].logits[0], dim=0) > 0.99


def test_mixtral_in_the_words_of_others(tmp_path: Path) -> None:
    original = save(tmp_path / "original", family="Mixtral", num_local_experts=7)
    theirs = expected(original, PROMPTS, 8)
    words = {"block_sparse_moe": "mlp", ".w1.": ".gate_proj.", ".w2.": ".down_proj.", ".w3.": ".up_proj."}
    tensors = {}
    for name, tensor in load_file(original / "model.safetensors").items():
        for word, other in words.items():
            name = name.replace(word, other)
        tensors[name] = tensor
    save_file(tensors, original / "model.safetensors")
    assert_same(ring_greedy(original, 2, PROMPTS, 8), theirs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": 8}, "config.json: num_experts_per_tok 8 is more than its 7 experts."),
        ({"num_local_experts": 0}, "config.json: Expected `int` >= 1 - at `$.num_local_experts`."),
        ({"decoder_sparse_step": 0}, "config.json: Expected `int` >= 1 - at `$.decoder_sparse_step`."),
    ],
)
def test_configurations_that_cannot_be(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError) as raised:
        read_config(open_model(folder).config | changes)
    assert str(raised.value) == message


def test_a_missing_expert_is_named(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.4.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(ModelError, match=r"tensor 'model\.layers\.1\.mlp\.experts\.4\.up_proj\.weight' is missing"):
        load(open_model(tmp_path), Alone())

"""Every family against transformers in float32: tiny random models of odd sizes, with windows shorter than prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ringlm.weights import open_model
from tests.models.reference import Greedy, assert_same, expected, generate, load, prompt, ring_greedy, save
from tests.parallel.local import run_ranks

GEMMA = {
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": 7,
    "query_pre_attn_scalar": 9,
}
EXPERTS = {"num_experts": 9, "num_experts_per_tok": 4, "moe_intermediate_size": 19}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 32}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("Mistral", {"sliding_window": 7}),
    "mistral without a window": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen2 with windows": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1, "num_hidden_layers": 3},
    ),
    "qwen2 with yarn": ("Qwen2", {"head_dim": 16, "rope_parameters": YARN}),
    "qwen3": ("Qwen3", {}),
    "gemma2": ("Gemma2", GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 9.0}),
    "gemma3": ("Gemma3", GEMMA | {"pad_token_id": None}),
    "phi3": ("Phi3", {"sliding_window": 9, "pad_token_id": None}),
    "phi4": (
        "Phi3",
        {
            "pad_token_id": None,
            "hidden_size": 72,
            "head_dim": 8,
            "tie_word_embeddings": True,
            "original_max_position_embeddings": 32,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0, 1.1, 1.5],
                "long_factor": [1.5, 3.0, 9.0],
            },
        },
    ),
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 2, "num_hidden_layers": 3, "pad_token_id": None}),
    "olmo2": ("Olmo2", {"seed": 1}),
    "mixtral": ("Mixtral", {"num_local_experts": 7}),
    "mixtral with a window": (
        "Mixtral",
        {"num_local_experts": 5, "num_experts_per_tok": 3, "sliding_window": 7, "seed": 1},
    ),
    "qwen3 moe": ("Qwen3Moe", EXPERTS | {"num_hidden_layers": 3, "mlp_only_layers": [1], "norm_topk_prob": True}),
    "qwen3 moe in every second layer": ("Qwen3Moe", EXPERTS | {"decoder_sparse_step": 2}),
}
PROMPTS = [prompt(11), prompt(1, seed=1), prompt(43, seed=2), prompt(18, seed=3)]
LONG = [prompt(43, seed=2), prompt(300, seed=4)]  # longer than phi4's original context, and than a block of queries
COUNT = 32
CUDA = {"device": torch.device("cuda"), "dtype": torch.bfloat16}
NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
OPTIONS = [
    pytest.param({"bits": 8}, id="int8"),
    pytest.param({"dtype": torch.bfloat16}, id="bfloat16"),
    pytest.param(CUDA, id="cuda", marks=NO_CUDA),
    pytest.param(CUDA | {"bits": 8}, id="cuda int8", marks=NO_CUDA),
]


def prompts_of(name: str) -> list[list[int]]:
    return LONG if name == "phi4" else PROMPTS


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[Greedy]]]:
    """Each model's folder and transformers' answers."""
    root = tmp_path_factory.mktemp("families")
    found = {}
    for name, (family, changes) in MODELS.items():
        folder = save(root / name.replace(" ", "-"), family=family, **changes)
        found[name] = folder, expected(folder, prompts_of(name), COUNT)
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("name", MODELS)
def test_greedy_equals_transformers(models: dict[str, Any], name: str, world_size: int) -> None:
    folder, theirs = models[name]
    assert_same(ring_greedy(folder, world_size, prompts_of(name), COUNT), theirs)


@pytest.mark.parametrize("name", MODELS)
def test_prefill_in_chunks(models: dict[str, Any], name: str) -> None:
    folder, theirs = models[name]
    assert_same(ring_greedy(folder, 2, prompts_of(name), COUNT, chunk=5), theirs)


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3"])
def test_prompts_longer_than_a_block_of_queries(models: dict[str, Any], name: str) -> None:
    folder, _ = models[name]
    theirs = expected(folder, LONG, 8)
    for chunk in (1 << 30, 270):
        assert_same(ring_greedy(folder, 2, LONG, 8, chunk=chunk), theirs)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", OPTIONS)
def test_packed_and_in_bfloat16_it_stays_close(models: dict[str, Any], name: str, options: dict[str, Any]) -> None:
    folder, theirs = models[name]
    files, prompts = open_model(folder), prompts_of(name)

    def first_logits(comm: Any) -> torch.Tensor:
        return torch.cat([greedy.logits[:1] for greedy in generate(load(files, comm, **options), comm, prompts, 1)])

    reference = torch.cat([greedy.logits[:1] for greedy in theirs])
    for world_size in (1, 3):
        for ours in run_ranks(world_size, first_logits):
            assert torch.cosine_similarity(ours, reference).min() > 0.99

"""Mixtral and Qwen3-MoE against transformers, in float32, on tiny random models of odd sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.reference import assert_same, expected, prompt, ring_greedy

COMMON: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 4,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
    "num_local_experts": 7,
    "num_experts_per_tok": 2,
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"intermediate_size": 50}),
    "mixtral with a window": ("Mixtral", {"intermediate_size": 33, "num_experts_per_tok": 3, "sliding_window": 16}),
}
PROMPTS = [prompt(11), prompt(1, seed=1), prompt(43, seed=2), prompt(30, seed=3)]
COUNT = 32
EAGER = {"experts_implementation": "eager"}  # transformers' own default wants sizes that are multiples of 4


def save(folder: Path, family: str, changes: dict[str, Any], seed: int = 0, **options: Any) -> Path:
    """A seeded model of that family, whose norms are random as well."""
    import transformers

    config = getattr(transformers, f"{family}Config")(**(COMMON | changes))
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder, **options)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Each variant's folder and transformers' answers."""
    root = tmp_path_factory.mktemp("mixtures")
    folders = {name: save(root / name.replace(" ", "-"), *variant) for name, variant in VARIANTS.items()}
    return {name: (folder, expected(folder, PROMPTS, COUNT, **EAGER)) for name, folder in folders.items()}


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_equals_transformers(models: dict[str, Any], variant: str, world_size: int) -> None:
    folder, theirs = models[variant]
    assert_same(ring_greedy(folder, world_size, PROMPTS, COUNT), theirs)

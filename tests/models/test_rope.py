"""Rotary frequencies and turns as transformers has them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ringlm.models.config import read_config
from ringlm.models.rope import RopeTable, frequencies, rotate

KINDS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 7000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_transformers(kind: str, dtype: torch.dtype) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=128,
        num_attention_heads=2,
        head_dim=64,
        rope_parameters=KINDS[kind],
        max_position_embeddings=16384,
    )
    theirs = LlamaRotaryEmbedding(config)
    rope = read_config(config.to_dict()).attention[0].rope
    torch.testing.assert_close(frequencies(rope, 64, 16384), theirs.inv_freq, rtol=1e-6, atol=0)
    table = RopeTable(rope, 64, 16384, dtype, torch.device("cpu"))
    positions = torch.tensor([0, 1, 17, 4096, 16383])
    heads = torch.randn(5, 3, 64).to(dtype)
    cos, sin = theirs(heads, positions[None])
    expected, _ = apply_rotary_pos_emb(heads.transpose(0, 1)[None], heads.transpose(0, 1)[None], cos, sin)
    rotate(heads, *table.at(positions))
    tolerance = 2e-3 if dtype == torch.float32 else 4e-2  # position 16383 turns by 16383 x a rounded frequency
    torch.testing.assert_close(heads, expected[0].transpose(0, 1), atol=tolerance, rtol=tolerance)

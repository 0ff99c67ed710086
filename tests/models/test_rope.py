"""Rotary frequencies and turns as transformers has them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ringlm.models.config import read_config
from ringlm.models.kinds import Rope
from ringlm.models.rope import RopeTable, frequencies, rotate

CONTEXT = 16384
KINDS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 7000.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 4096,
    },
    "yarn in full": {
        "rope_type": "yarn",
        "rope_theta": 50000.0,
        "factor": 16.0,
        "beta_fast": 24.0,
        "beta_slow": 2.0,
        "mscale": 0.7,
        "mscale_all_dim": 1.2,
        "truncate": False,
        "original_max_position_embeddings": 1024,
    },
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 4096,
        "short_factor": [1.0 + index / 40 for index in range(32)],
        "long_factor": [1.0 + index for index in range(32)],
    },
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
@pytest.mark.parametrize("context", [2048, CONTEXT])
def test_as_transformers(kind: str, dtype: torch.dtype, context: int) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=128,
        num_attention_heads=2,
        head_dim=64,
        rope_parameters=KINDS[kind],
        max_position_embeddings=8192 if kind == "dynamic" else CONTEXT,
    )
    theirs = LlamaRotaryEmbedding(config)
    rope = read_config(config.to_dict()).attention[0].rope
    table = RopeTable(rope, 64, context, dtype, torch.device("cpu"))
    positions = torch.tensor([0, 1, 17, context // 4, context - 1])  # the last one tells transformers the length
    heads = torch.randn(5, 3, 64).to(dtype)
    cos, sin = theirs(heads, positions[None])
    torch.testing.assert_close(frequencies(rope, 64, context), theirs.inv_freq, rtol=1e-6, atol=0)
    expected, _ = apply_rotary_pos_emb(heads.transpose(0, 1)[None], heads.transpose(0, 1)[None], cos, sin)
    rotate(heads, *table.at(positions))
    tolerance = 2e-3 if dtype == torch.float32 else 4e-2  # position 16383 turns by 16383 x a rounded frequency
    torch.testing.assert_close(heads, expected[0].transpose(0, 1), atol=tolerance, rtol=tolerance)


def test_a_part_of_each_head_turns() -> None:
    table = RopeTable(Rope(theta=100.0, partial=0.5), 8, 32, torch.float32, torch.device("cpu"))
    heads = torch.randn(3, 2, 8)
    turned, short = heads.clone(), heads[..., :4].clone()
    rotate(turned, *table.at(torch.tensor([0, 5, 31])))
    rotate(short, *RopeTable(Rope(100.0), 4, 32, torch.float32, torch.device("cpu")).at(torch.tensor([0, 5, 31])))
    assert torch.equal(turned[..., 4:], heads[..., 4:])
    assert torch.equal(turned[..., :4], short)

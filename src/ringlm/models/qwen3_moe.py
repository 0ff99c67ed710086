"""Qwen3-MoE: Qwen3 with a mixture of experts in place of the MLP, in most layers or all of them (arXiv:2505.09388).

transformers' Qwen3MoeForCausalLM is the reference.
"""

from __future__ import annotations

from ringlm.models.layers import Block, LayerBuilder
from ringlm.models.llama import attention_split, mlp_split
from ringlm.models.mixture import has_mixture, mixture


def block(layer: LayerBuilder) -> Block:
    """Qwen3's attention, then the mixture, or an MLP."""
    attention = layer.attention(
        *attention_split(layer), before=layer.norm("input_layernorm"), heads=layer.norm_of_each_head()
    )
    norm = layer.norm("post_attention_layernorm")
    return Block(attention, mixture(layer, norm) if has_mixture(layer) else layer.mlp(*mlp_split(layer), before=norm))

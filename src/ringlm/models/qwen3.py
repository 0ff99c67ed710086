"""Qwen3: Llama with a norm on each query and key head before they are turned (arXiv:2505.09388).

transformers' Qwen3ForCausalLM is the reference. Split as Llama is; every rank holds the heads' norms.
"""

from __future__ import annotations

from ringlm.models.layers import Block, LayerBuilder
from ringlm.models.llama import attention_split, mlp_split


def block(layer: LayerBuilder) -> Block:
    """As Llama's, with norms on the heads."""
    return Block(
        layer.attention(*attention_split(layer), before=layer.norm("input_layernorm"), heads=layer.norm_of_each_head()),
        layer.mlp(*mlp_split(layer), before=layer.norm("post_attention_layernorm")),
    )

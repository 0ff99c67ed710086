"""Phi-3 and Phi-4: Llama whose files hold queries, keys and values as one matrix, and gates and ups as another
(arXiv:2404.14219).

Rotary positions may turn only a part of each head, and have other factors where the context is long (LongRoPE).
transformers' Phi3ForCausalLM is the reference. Split as Llama is, each part of a fused matrix for itself.
"""

from __future__ import annotations

from ringlm.models.layers import Block, LayerBuilder
from ringlm.models.llama import attention_split, mlp_split
from ringlm.parallel.linear import fused


def block(layer: LayerBuilder) -> Block:
    """As Llama's, from fused matrices."""
    qkv, output = attention_split(layer)
    gate_up, down = mlp_split(layer)
    return Block(
        layer.attention(fused(f"{layer.prefix}self_attn.qkv_proj", qkv), output, before=layer.norm("input_layernorm")),
        layer.mlp(
            fused(f"{layer.prefix}mlp.gate_up_proj", gate_up), down, before=layer.norm("post_attention_layernorm")
        ),
    )

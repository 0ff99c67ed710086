"""Gemma 2: norms before and after attention and the MLP, soft caps, and every second layer with a window
(arXiv:2408.00118).

Norms multiply by 1 + weight, the embedding is scaled by the root of its width, and the MLP's gate is GELU. Scores and
logits are capped by a tanh; scores are scaled by query_pre_attn_scalar. transformers' Gemma2ForCausalLM is the
reference. Split as Llama is.
"""

from __future__ import annotations

from ringlm.models.layers import Block, HeadNorm, LayerBuilder
from ringlm.models.llama import attention_split, mlp_split


def block(layer: LayerBuilder, heads: HeadNorm | None = None) -> Block:
    """Four norms: the names say before and after what."""
    return Block(
        layer.attention(
            *attention_split(layer),
            before=layer.norm("input_layernorm"),
            after=layer.norm("post_attention_layernorm"),
            heads=heads,
        ),
        layer.mlp(
            *mlp_split(layer),
            before=layer.norm("pre_feedforward_layernorm"),
            after=layer.norm("post_feedforward_layernorm"),
        ),
    )

"""Mixtral: Llama whose MLP is a mixture of experts, of which each token takes two (arXiv:2401.04088).

transformers' MixtralForCausalLM is the reference.
"""

from __future__ import annotations

from ringlm.models.layers import Block, LayerBuilder
from ringlm.models.llama import attention_split
from ringlm.models.mixture import mixture


def block(layer: LayerBuilder) -> Block:
    """A norm before attention, and one before the mixture."""
    return Block(
        layer.attention(*attention_split(layer), before=layer.norm("input_layernorm")),
        mixture(layer, layer.norm("post_attention_layernorm")),
    )

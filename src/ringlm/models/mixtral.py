"""Mixtral: Llama whose MLP is a mixture of experts, of which each token takes two (arXiv:2401.04088).

transformers' MixtralForCausalLM is the reference.
"""

from __future__ import annotations

from ringlm.models.causal_lm import CausalLM
from ringlm.models.config import ModelConfig
from ringlm.models.layers import Block, LayerBuilder, causal_lm
from ringlm.models.llama import attention_split
from ringlm.models.loader import ShardLoader
from ringlm.models.mixture import mixture
from ringlm.parallel.shard import RankShard


def build(config: ModelConfig, shard: RankShard, load: ShardLoader) -> CausalLM:
    """This rank's part of the model."""
    return causal_lm(config, shard, load, block)


def block(layer: LayerBuilder) -> Block:
    """A norm before attention, and one before the mixture."""
    return Block(
        layer.attention(*attention_split(layer), before=layer.norm("input_layernorm")),
        mixture(layer, layer.norm("post_attention_layernorm")),
    )

"""Llama: RMS norms, rotary positions, grouped-query attention, an MLP gated by SiLU (arXiv:2302.13971).

transformers' LlamaForCausalLM is the reference. What is split how is at the end; most families split alike.
"""

from __future__ import annotations

from ringlm.models.layers import Block, LayerBuilder
from ringlm.parallel.linear import LinearSpec, column_parallel, row_parallel


def block(layer: LayerBuilder) -> Block:
    """A norm before attention, and one before the MLP."""
    return Block(
        layer.attention(*attention_split(layer), before=layer.norm("input_layernorm")),
        layer.mlp(*mlp_split(layer), before=layer.norm("post_attention_layernorm")),
    )


def attention_split(layer: LayerBuilder) -> tuple[LinearSpec, LinearSpec]:
    """Query and key-value heads by rank; the product that ends them is reduced."""
    config, shard, prefix = layer.config, layer.shard, f"{layer.prefix}self_attn."
    hidden, size = config.hidden_size, config.head_dim
    queries = (config.query_heads * size, shard.query_heads * size)  # (whole, this rank's)
    keys = (config.kv_heads * size, shard.kv_heads * size)
    return (
        column_parallel(prefix, hidden, config.qkv_bias, q_proj=queries, k_proj=keys, v_proj=keys),
        row_parallel(f"{prefix}o_proj", (hidden, queries[0]), queries[1], config.output_bias),
    )


def mlp_split(layer: LayerBuilder) -> tuple[LinearSpec, LinearSpec]:
    """The columns of the MLP's hidden layer by rank; the product that ends them is reduced."""
    config, prefix = layer.config, f"{layer.prefix}mlp."
    columns = (config.columns, layer.shard.columns)
    return (
        column_parallel(prefix, config.hidden_size, config.mlp_bias, gate_proj=columns, up_proj=columns),
        row_parallel(f"{prefix}down_proj", (config.hidden_size, columns[0]), columns[1], config.mlp_bias),
    )

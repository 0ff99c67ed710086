"""Llama: RMS norms, rotary positions, grouped-query attention, an MLP gated by SiLU (arXiv:2302.13971).

transformers' LlamaForCausalLM is the reference. What is split how is at the end.
"""

from __future__ import annotations

from torch import Tensor

from ringlm.models.attention import AttentionStep
from ringlm.models.causal_lm import CausalLM
from ringlm.models.config import ModelConfig
from ringlm.models.loader import ShardLoader
from ringlm.models.rope import RopeTable
from ringlm.parallel.linear import (
    ColumnParallel,
    LinearSpec,
    VocabularyParallel,
    column_parallel,
    row_parallel,
)
from ringlm.parallel.prologue import RmsNorm, SiluGate
from ringlm.parallel.shard import RankShard


class LlamaBlock:
    """Attention, then the MLP: each reads a norm of the residual and adds to it, reduced once."""

    def __init__(self, config: ModelConfig, shard: RankShard, layer: int, load: ShardLoader) -> None:
        prefix = f"model.layers.{layer}."
        specs = split(config, shard, prefix)
        self.cache_layer, self.head_dim = layer - shard.layers.start, config.head_dim

        def norm(name: str) -> RmsNorm:
            return RmsNorm(load.vector(f"{prefix}{name}.weight", config.hidden_size), config.norm_eps)

        self.qkv = load.column(specs["qkv"], norm("input_layernorm"))
        self.output = load.row(specs["output"])
        self.gate_up = load.column(specs["gate_up"], norm("post_attention_layernorm"))
        self.down = load.row(specs["down"], SiluGate())

    def forward(self, hidden: Tensor, attention: AttentionStep) -> None:
        """hidden (T, hidden_size) += attention, then += MLP."""
        qkv = self.qkv(hidden).view(hidden.shape[0], -1, self.head_dim)  # (T, query + 2 * key-value heads, head_dim)
        self.output.add_to(hidden, attention(self.cache_layer, qkv))
        self.down.add_to(hidden, self.gate_up(hidden))


def build(config: ModelConfig, shard: RankShard, load: ShardLoader) -> CausalLM:
    """This rank's part of the model."""
    size = (config.vocabulary, config.hidden_size)
    embedding = load.vocabulary("model.embed_tokens", size, shard.vocabulary)
    blocks = [LlamaBlock(config, shard, layer, load) for layer in range(shard.layers.start, shard.layers.stop)]
    norm = RmsNorm(load.vector("model.norm.weight", config.hidden_size), config.norm_eps)
    head = embedding if config.tied else load.vocabulary("lm_head", size, shard.vocabulary)
    return CausalLM(
        config,
        shard,
        RopeTable(config.rope, config.head_dim, config.context, load.dtype, load.device),
        VocabularyParallel(embedding, shard.vocabulary, load.comm),
        blocks,
        ColumnParallel(head, prologue=norm),
        load.nbytes,
    )


def split(config: ModelConfig, shard: RankShard, prefix: str) -> dict[str, LinearSpec]:
    """Query and key-value heads, and the MLP's columns, by rank; the products that end them are reduced."""
    hidden, size = config.hidden_size, config.head_dim
    queries = (config.query_heads * size, shard.query_heads * size)  # (whole, this rank's)
    keys = (config.kv_heads * size, shard.kv_heads * size)
    columns = (config.columns, shard.columns)
    attn, mlp = prefix + "self_attn.", prefix + "mlp."
    return {
        "qkv": column_parallel(attn, hidden, config.qkv_bias, q_proj=queries, k_proj=keys, v_proj=keys),
        "output": row_parallel(attn + "o_proj", (hidden, queries[0]), queries[1], config.output_bias),
        "gate_up": column_parallel(mlp, hidden, config.mlp_bias, gate_proj=columns, up_proj=columns),
        "down": row_parallel(mlp + "down_proj", (hidden, columns[0]), columns[1], config.mlp_bias),
    }

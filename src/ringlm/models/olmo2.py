"""OLMo 2: norms only after attention and the MLP, and on queries and keys over all heads together (arXiv:2501.00656).

transformers' Olmo2ForCausalLM is the reference. Split as Llama is; the heads' norms need the sum of squares of every
rank's heads, which one more small reduction brings.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ringlm.models.layers import Block, LayerBuilder
from ringlm.models.llama import attention_split, mlp_split


def block(layer: LayerBuilder) -> Block:
    """Attention and the MLP read the residual as it is."""
    return Block(
        layer.attention(
            *attention_split(layer), after=layer.norm("post_attention_layernorm"), heads=NormOfAllHeads(layer)
        ),
        layer.mlp(*mlp_split(layer), after=layer.norm("post_feedforward_layernorm")),
    )


class NormOfAllHeads:
    """A norm over the queries of all ranks, and one over their keys."""

    def __init__(self, layer: LayerBuilder) -> None:
        config, shard, size = layer.config, layer.shard, layer.config.head_dim
        names = [f"{layer.prefix}self_attn.{name}_norm.weight" for name in ("q", "k")]
        wholes = [config.query_heads * size, config.kv_heads * size]
        parts = [shard.query_heads * size, shard.kv_heads * size]
        self._weights = [layer.load.vector(*vector) for vector in zip(names, wholes, parts, strict=True)]
        self._heads = [len(shard.query_heads), len(shard.kv_heads)]
        self._comm, self._eps = layer.load.comm, config.norm_eps
        # A key head that several ranks repeat counts once, with the first of its query heads.
        group = config.query_heads // config.kv_heads
        first = shard.query_heads.start == shard.kv_heads.start * group
        self._shares = torch.tensor([1 / wholes[0], first / wholes[1]], device=layer.load.device)

    def __call__(self, qkv: Tensor) -> None:
        """Norms the queries and keys of qkv (T, query + 2 * key-value heads, head_dim) in place."""
        queries, keys = self._heads
        parts = [part.flatten(1) for part in (qkv[:, :queries], qkv[:, queries : queries + keys])]
        squares = torch.stack([part.float().square().sum(1) for part in parts], 1)  # (T, 2)
        means = self._comm.all_reduce(squares.mul_(self._shares))
        factors = means.add_(self._eps).rsqrt_().unsqueeze(2)  # (T, 2, 1)
        for index, (part, weight) in enumerate(zip(parts, self._weights, strict=True)):
            part.copy_(part.float().mul_(factors[:, index]).mul_(weight))

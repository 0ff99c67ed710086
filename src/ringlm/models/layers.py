"""What the families' layers are made of: attention, and the MLP or what a family has in its place. Each reads the
residual, through a norm in most families, and adds to it, reduced once. Knows no family.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final, Protocol, TypeAlias

import torch
from torch import Tensor

from ringlm.models.attention import AttentionStep
from ringlm.models.causal_lm import CausalLM
from ringlm.models.config import ModelConfig
from ringlm.models.loader import ShardLoader
from ringlm.models.rope import RopeTable
from ringlm.parallel.linear import ColumnParallel, LinearSpec, RowParallel, VocabularyParallel
from ringlm.parallel.prologue import Gate, RmsNorm, norm_heads
from ringlm.parallel.shard import RankShard

# What norms this rank's queries and keys in qkv (T, query + 2 * key-value heads, head_dim), in place.
HeadNorm: TypeAlias = Callable[[Tensor], None]
GATES: Final = {"silu": Gate(), "gelu_pytorch_tanh": Gate(gelu=True)}  # by config.ACTIVATIONS


class Mlp(Protocol):
    """What follows attention in a layer."""

    def add_to(self, hidden: Tensor) -> None:
        """Adds to `hidden` (T, hidden_size) in place."""
        ...


class Attention:
    """Queries, keys and values in one product, attention of one kind, and the product that ends it."""

    def __init__(
        self, qkv: ColumnParallel, output: RowParallel, layer: int, kind: int, head_dim: int, norm: HeadNorm | None
    ) -> None:
        self.qkv, self.output, self.norm = qkv, output, norm
        self.layer, self.kind, self.head_dim = layer, kind, head_dim  # the layer in the cache; the kind's index

    def add_to(self, hidden: Tensor, step: AttentionStep) -> None:
        """hidden (T, hidden_size) += attention."""
        qkv = self.qkv(hidden).view(hidden.shape[0], -1, self.head_dim)  # (T, query + 2 * key-value heads, head_dim)
        if self.norm is not None:
            self.norm(qkv)
        self.output.add_to(hidden, step(self.layer, self.kind, qkv))


class GatedMlp:
    """Gates and ups in one product; the gate belongs to the product that follows."""

    def __init__(self, gate_up: ColumnParallel, down: RowParallel) -> None:
        self.gate_up, self.down = gate_up, down

    def add_to(self, hidden: Tensor) -> None:
        """hidden (T, hidden_size) += MLP."""
        self.down.add_to(hidden, self.gate_up(hidden))


class Block:
    """One layer: attention, then the MLP."""

    def __init__(self, attention: Attention, mlp: Mlp) -> None:
        self.attention, self.mlp = attention, mlp

    def forward(self, hidden: Tensor, step: AttentionStep, kept: Tensor | None = None) -> Tensor:
        """hidden (T, hidden_size) += attention, then += MLP, in place; or of the rows `kept` alone, in a copy."""
        self.attention.add_to(hidden, step)
        if kept is not None:
            hidden = hidden[kept]
        self.mlp.add_to(hidden)
        return hidden


class LayerBuilder:
    """Makes the parts of layer `layer` from this rank's parts of its tensors, whose names begin with `prefix`."""

    def __init__(self, config: ModelConfig, shard: RankShard, load: ShardLoader, layer: int) -> None:
        self.config, self.shard, self.load, self.layer = config, shard, load, layer
        self.prefix = f"model.layers.{layer}."

    def norm(self, name: str) -> RmsNorm:
        """The norm `name` of the residual's width."""
        return rms_norm(self.config, self.load, self.prefix + name, self.config.hidden_size)

    def norm_of_each_head(self) -> HeadNorm:
        """q_norm and k_norm, of a head's width, on every head for itself."""
        queries, keys = (
            rms_norm(self.config, self.load, f"{self.prefix}self_attn.{name}_norm", self.config.head_dim)
            for name in ("q", "k")
        )
        shard = self.shard
        return partial(norm_heads, queries, len(shard.query_heads), keys, len(shard.kv_heads))

    def attention(
        self,
        qkv: LinearSpec,
        output: LinearSpec,
        before: RmsNorm | None = None,
        after: RmsNorm | None = None,
        heads: HeadNorm | None = None,
    ) -> Attention:
        """Attention with a norm before and after it, and on its heads."""
        return Attention(
            self.load.column(qkv, before),
            self.load.row(output, norm=after),
            self.layer - self.shard.layers.start,
            self.config.kind_of_layer[self.layer],
            self.config.head_dim,
            heads,
        )

    def mlp(
        self, gate_up: LinearSpec, down: LinearSpec, before: RmsNorm | None = None, after: RmsNorm | None = None
    ) -> GatedMlp:
        """The gated MLP with a norm before and after it."""
        gate = GATES[self.config.activation]
        return GatedMlp(self.load.column(gate_up, before), self.load.row(down, gate, after))


def rms_norm(config: ModelConfig, load: ShardLoader, name: str, size: int) -> RmsNorm:
    """The norm whose weight is the vector `name`.weight plus the family's offset, computed once in float32."""
    if not config.norm_offset:
        return RmsNorm(load.vector(f"{name}.weight", size), config.norm_eps)
    return RmsNorm(load.vector(f"{name}.weight", size, dtype=torch.float32) + config.norm_offset, config.norm_eps)


def causal_lm(
    block: Callable[[LayerBuilder], Block], config: ModelConfig, shard: RankShard, load: ShardLoader
) -> CausalLM:
    """This rank's part of a model whose layers `block` makes: embedding, layers, norm and head."""
    size = (config.vocabulary, config.hidden_size)
    embedding = load.vocabulary("model.embed_tokens", size, shard.vocabulary)
    layers = range(shard.layers.start, shard.layers.stop)
    blocks = [block(LayerBuilder(config, shard, load, layer)) for layer in layers]
    norm = rms_norm(config, load, "model.norm", config.hidden_size)
    head = embedding if config.tied else load.vocabulary("lm_head", size, shard.vocabulary)
    ropes = dict.fromkeys(kind.rope for kind in config.attention)
    tables = {rope: RopeTable(rope, config.head_dim, config.context, load.dtype, load.device) for rope in ropes}
    return CausalLM(
        config,
        shard,
        [(kind, tables[kind.rope]) for kind in config.attention],
        VocabularyParallel(embedding, shard.vocabulary, load.comm),
        blocks,
        ColumnParallel(head, prologue=norm),
        load.nbytes,
    )

"""config.json, checked, as a ModelConfig. Torch-free, so that a plan can be made without loading anything."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final

import msgspec

from ringlm.errors import ModelError
from ringlm.models.kinds import AttentionKind, Count, Positive, read_kinds
from ringlm.models.mixture_config import Mixture, read_mixture
from ringlm.models.registry import FAMILIES
from ringlm.parallel.shard import Dimensions

MAX_CONTEXT: Final = 1 << 24  # positions; more is a damaged file
ACTIVATIONS: Final = ("silu", "gelu_pytorch_tanh")
_COMMON: Final = (  # fields that nearly all families have, by which the others are divided
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "tie_word_embeddings",
    "eos_token_id",
)

Layers = Annotated[int, msgspec.Meta(ge=1, le=1 << 12)]


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Dimensions):
    """What a family needs to know of its model, beside the sizes that a shard plan divides."""

    architecture: str
    norm_eps: float
    norm_offset: float  # is added to the norms' weights
    activation: str  # of the MLP's gate, one of ACTIVATIONS
    attention: tuple[AttentionKind, ...]
    kind_of_layer: tuple[int, ...]  # index into `attention`, one a layer
    embedding_scale: float
    logit_cap: float | None  # logits become logit_cap * tanh(logit / logit_cap)
    tied: bool  # the output head is the embedding
    qkv_bias: bool
    output_bias: bool  # of the attention's output
    mlp_bias: bool
    eos_token_ids: tuple[int, ...]
    mixture: Mixture | None
    foreign: Mapping[str, Any] | None  # config.json, of a family that is not in the registry: transformers reads it


class _Config(msgspec.Struct):
    """The fields of config.json that are used."""

    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Layers
    num_attention_heads: Count
    vocab_size: Count
    num_key_value_heads: Count | None = None
    head_dim: Count | None = None
    max_position_embeddings: Annotated[int, msgspec.Meta(ge=1, le=MAX_CONTEXT)] = 2048
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    hidden_activation: str | None = None  # Gemma's hidden_act
    final_logit_softcapping: Positive | None = None
    use_bidirectional_attention: bool | None = None
    norm_offset: float = 0.0  # ours: Gemma's norms, but for GGUF
    scaled_embedding: bool = False  # ours: Gemma's
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_output_bias: bool | None = None  # ours, for GGUF: where it differs from attention_bias
    mlp_bias: bool = False
    eos_token_id: int | list[int] | None = None


def read_config(config: Mapping[str, Any], name: str = "") -> ModelConfig:
    """The checked configuration of the model called `name`; ModelError names what is unknown, missing or contradictory
    in it."""
    names = config.get("architectures")
    architecture = names[0] if isinstance(names, list) and names else None
    if not isinstance(architecture, str):
        raise ModelError(f"config.json: architecture {architecture!r} is not known; known are {', '.join(FAMILIES)}.")
    foreign = None if architecture in FAMILIES else config
    if foreign is None:
        config = {**FAMILIES[architecture].defaults, **config}
    else:
        config = {name: config[name] for name in _COMMON if name in config}
    try:
        raw = msgspec.convert(config, _Config)
        head_dim = raw.head_dim or raw.hidden_size // raw.num_attention_heads
        if head_dim % 2 or not head_dim:
            raise ModelError(f"config.json: head_dim {head_dim} has to be even for rotary positions.")
        kinds = read_kinds(config, raw.num_hidden_layers, head_dim, raw.max_position_embeddings)
        mixture = read_mixture(config)
    except msgspec.ValidationError as error:
        what = "config.json" if foreign is None else f"config.json: {architecture} is not a family known here"
        raise ModelError(f"{what}: {error}.") from error
    activation = raw.hidden_activation or raw.hidden_act
    if activation not in ACTIVATIONS:
        raise ModelError(f"config.json: hidden_act {activation!r} is not supported; {' and '.join(ACTIVATIONS)} are.")
    if raw.use_bidirectional_attention:
        raise ModelError("config.json: use_bidirectional_attention is not supported: such a model writes no text.")
    kv_heads = raw.num_key_value_heads or raw.num_attention_heads
    if raw.num_attention_heads % kv_heads:
        raise ModelError(
            f"config.json: {raw.num_attention_heads} num_attention_heads cannot share {kv_heads} num_key_value_heads."
        )
    attention = tuple(dict.fromkeys(kinds))
    stretch = max(kind.rope.factor if kind.rope.kind == "dynamic" else 1.0 for kind in attention)
    eos = raw.eos_token_id
    return ModelConfig(
        name=name,
        architecture=architecture,
        hidden_size=raw.hidden_size,
        layers=raw.num_hidden_layers,
        query_heads=raw.num_attention_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        columns=raw.intermediate_size,
        expert_columns=0 if mixture is None else mixture.columns,
        vocabulary=raw.vocab_size,
        context=min(MAX_CONTEXT, int(raw.max_position_embeddings * stretch)),
        norm_eps=raw.rms_norm_eps,
        norm_offset=raw.norm_offset,
        activation=activation,
        attention=attention,
        kind_of_layer=tuple(attention.index(kind) for kind in kinds),
        embedding_scale=math.sqrt(raw.hidden_size) if raw.scaled_embedding else 1.0,
        logit_cap=raw.final_logit_softcapping,
        tied=raw.tie_word_embeddings,
        qkv_bias=raw.attention_bias,
        output_bias=raw.attention_bias if raw.attention_output_bias is None else raw.attention_output_bias,
        mlp_bias=raw.mlp_bias,
        eos_token_ids=() if eos is None else (eos,) if isinstance(eos, int) else tuple(eos),
        mixture=mixture,
        foreign=foreign,
    )

"""config.json, checked, as a ModelConfig. Torch-free, so that a plan can be made without loading anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final

import msgspec

from ringlm.errors import ModelError
from ringlm.models.registry import FAMILIES
from ringlm.parallel.shard import Dimensions

MAX_CONTEXT: Final = 1 << 24  # positions; more is a damaged file

Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]


@dataclass(frozen=True)
class Rope:
    """Rotary positions: `kind` is default, linear, llama3, or factors (each frequency over its own factor)."""

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192  # positions
    factors: tuple[float, ...] = ()  # (head_dim / 2,)


@dataclass(frozen=True)
class ModelConfig:
    """What a family needs to know of its model. `context` is in positions."""

    architecture: str
    hidden_size: int
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    columns: int
    vocabulary: int
    context: int
    norm_eps: float
    rope: Rope
    tied: bool  # the output head is the embedding
    qkv_bias: bool
    output_bias: bool  # of the attention's output
    mlp_bias: bool
    eos_token_ids: tuple[int, ...]


class _Rope(msgspec.Struct):
    """rope_scaling, and transformers 5's rope_parameters, which holds theta as well."""

    rope_type: str | None = None
    type: str | None = None  # rope_type, before it was renamed
    rope_theta: float | None = None
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: Count | None = None
    partial_rotary_factor: float = 1.0
    factors: tuple[float, ...] = ()


class _Config(msgspec.Struct):
    """The fields of config.json that are used."""

    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Count
    num_attention_heads: Count
    vocab_size: Count
    num_key_value_heads: Count | None = None
    head_dim: Count | None = None
    max_position_embeddings: Annotated[int, msgspec.Meta(ge=1, le=MAX_CONTEXT)] = 2048
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    rope_theta: float | None = None
    rope_scaling: _Rope | None = None
    rope_parameters: _Rope | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_output_bias: bool | None = None  # ours, for GGUF: where it differs from attention_bias
    mlp_bias: bool = False
    eos_token_id: int | list[int] | None = None


def read_config(config: Mapping[str, Any]) -> ModelConfig:
    """The checked configuration; ModelError names what is unknown, missing or contradictory in it."""
    names = config.get("architectures")
    architecture = names[0] if isinstance(names, list) and names else None
    if not isinstance(architecture, str) or architecture not in FAMILIES:
        code = " The code that its folder brings along is never run." if "auto_map" in config else ""
        raise ModelError(
            f"config.json: architecture {architecture!r} is not known; known are {', '.join(FAMILIES)}.{code}"
        )
    try:
        raw = msgspec.convert(config, _Config)
    except msgspec.ValidationError as error:
        raise ModelError(f"config.json: {error}.") from error
    if raw.hidden_act != "silu":
        raise ModelError(f"config.json: hidden_act {raw.hidden_act!r} is not supported; silu is.")
    kv_heads = raw.num_key_value_heads or raw.num_attention_heads
    head_dim = raw.head_dim or raw.hidden_size // raw.num_attention_heads
    if raw.num_attention_heads % kv_heads:
        raise ModelError(
            f"config.json: {raw.num_attention_heads} num_attention_heads cannot share {kv_heads} num_key_value_heads."
        )
    if head_dim % 2 or not head_dim:
        raise ModelError(f"config.json: head_dim {head_dim} has to be even for rotary positions.")
    eos = raw.eos_token_id
    return ModelConfig(
        architecture=architecture,
        hidden_size=raw.hidden_size,
        layers=raw.num_hidden_layers,
        query_heads=raw.num_attention_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        columns=raw.intermediate_size,
        vocabulary=raw.vocab_size,
        context=raw.max_position_embeddings,
        norm_eps=raw.rms_norm_eps,
        rope=_rope(raw, head_dim),
        tied=raw.tie_word_embeddings,
        qkv_bias=raw.attention_bias,
        output_bias=raw.attention_bias if raw.attention_output_bias is None else raw.attention_output_bias,
        mlp_bias=raw.mlp_bias,
        eos_token_ids=() if eos is None else (eos,) if isinstance(eos, int) else tuple(eos),
    )


def dimensions(config: Mapping[str, Any], name: str = "") -> Dimensions:
    """What a shard plan divides; `name` is the model's, for messages. Raises as `read_config` does."""
    checked = read_config(config)
    return Dimensions(
        hidden_size=checked.hidden_size,
        layers=checked.layers,
        query_heads=checked.query_heads,
        kv_heads=checked.kv_heads,
        head_dim=checked.head_dim,
        columns=checked.columns,
        vocabulary=checked.vocabulary,
        context=checked.context,
        name=name,
    )


def _rope(raw: _Config, head_dim: int) -> Rope:
    found = raw.rope_parameters or raw.rope_scaling or _Rope()
    kind = found.rope_type or found.type or "default"
    theta = found.rope_theta or raw.rope_theta or 10000.0
    if kind not in ("default", "linear", "llama3", "factors"):
        raise ModelError(f"config.json: rope type {kind!r} is not supported; default, linear and llama3 are.")
    if theta <= 0 or found.factor <= 0 or found.partial_rotary_factor != 1.0:
        raise ModelError("config.json: theta and factor of the rope must be above 0, and every dimension rotary.")
    if kind == "llama3" and not 0 < found.low_freq_factor < found.high_freq_factor:
        raise ModelError("config.json: the rope's low_freq_factor must be below its high_freq_factor.")
    if kind == "factors" and (len(found.factors) != head_dim // 2 or min(found.factors) <= 0):
        raise ModelError(f"{len(found.factors)} rope factors for {head_dim // 2} frequencies; all must be above 0.")
    return Rope(
        theta=theta,
        kind=kind,
        factor=found.factor,
        low_freq_factor=found.low_freq_factor,
        high_freq_factor=found.high_freq_factor,
        original_context=found.original_max_position_embeddings or raw.max_position_embeddings,
        factors=found.factors,
    )

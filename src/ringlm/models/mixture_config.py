"""What config.json says of a mixture of experts. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

from ringlm.errors import ModelError

Experts = Annotated[int, msgspec.Meta(ge=1, le=1 << 14)]


@dataclass(frozen=True)
class Mixture:
    """Experts in place of the MLP of some layers: how many there are, how many of them each token takes, and the
    columns of the hidden layer of each."""

    experts: int
    chosen: int
    columns: int
    normalized: bool  # the weights of a token's experts sum to 1
    layers: frozenset[int]


class _Config(msgspec.Struct):
    """The fields of config.json that are used."""

    num_hidden_layers: int
    intermediate_size: int
    num_local_experts: Experts | None = None  # transformers 5's word
    num_experts: Experts | None = None
    num_experts_per_tok: Experts = 1
    moe_intermediate_size: Annotated[int, msgspec.Meta(ge=1, le=1 << 31)] | None = None
    norm_topk_prob: bool = False
    decoder_sparse_step: Annotated[int, msgspec.Meta(ge=1)] = 1
    mlp_only_layers: tuple[int, ...] | None = None


def read_mixture(config: Mapping[str, Any]) -> Mixture | None:
    """The model's mixture, if it has one. Raises ModelError for one that cannot be, msgspec.ValidationError for fields
    that are not of their type."""
    raw = msgspec.convert(config, _Config)
    experts = raw.num_local_experts or raw.num_experts
    if experts is None:
        return None
    if raw.num_experts_per_tok > experts:
        raise ModelError(
            f"config.json: num_experts_per_tok {raw.num_experts_per_tok} is more than its {experts} experts."
        )
    dense = raw.mlp_only_layers or ()
    layers = (layer for layer in range(raw.num_hidden_layers) if (layer + 1) % raw.decoder_sparse_step == 0)
    return Mixture(
        experts=experts,
        chosen=raw.num_experts_per_tok,
        columns=raw.moe_intermediate_size or raw.intermediate_size,
        normalized=raw.norm_topk_prob,
        layers=frozenset(layers) - frozenset(dense),
    )

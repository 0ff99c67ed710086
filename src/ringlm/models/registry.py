"""Which module holds which family, imported when a model asks for it. Each has `build(config, shard, load)`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from ringlm.models.causal_lm import CausalLM
    from ringlm.models.config import ModelConfig
    from ringlm.models.loader import ShardLoader
    from ringlm.parallel.shard import RankShard


class Family(NamedTuple):
    """A module of this package, and what transformers takes for granted where the family's config.json is silent."""

    module: str
    defaults: Mapping[str, Any] = {}


_MIXTRAL: Final = {"norm_topk_prob": True, "num_local_experts": 8, "num_experts_per_tok": 2, "use_sliding_window": True}

FAMILIES: Final[Mapping[str, Family]] = {  # by config.json's "architectures"
    "LlamaForCausalLM": Family("llama"),
    "MixtralForCausalLM": Family("mixtral", _MIXTRAL),
}


def builder(architecture: str) -> Callable[[ModelConfig, RankShard, ShardLoader], CausalLM]:
    """The function that builds one rank's part of a model of `architecture`, one of FAMILIES."""
    build: Callable[[ModelConfig, RankShard, ShardLoader], CausalLM]
    build = importlib.import_module(f"ringlm.models.{FAMILIES[architecture].module}").build
    return build

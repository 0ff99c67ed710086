"""Which module holds which family, imported when a model asks for it: its `block` makes a layer. Families without one
are built by fallback.py."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from ringlm.models.causal_lm import CausalLM
    from ringlm.models.config import ModelConfig
    from ringlm.models.loader import ShardLoader
    from ringlm.parallel.shard import RankShard


class Family(NamedTuple):
    """A module of this package, and what transformers takes for granted where the family's config.json is silent.

    A family that is Llama with other numbers (a window, biases, layers without positions) has Llama's.
    """

    module: str
    defaults: Mapping[str, Any] = {}


_QWEN: Final = {"sliding_window": 4096, "max_window_layers": 28}
_MIXTRAL: Final = {"use_sliding_window": True, "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True}
_QWEN3_MOE: Final = {
    "sliding_window": 4096,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
}
_GEMMA: Final = {
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "use_sliding_window": True,
    "sliding_window": 4096,
    "norm_offset": 1.0,
    "scaled_embedding": True,
    "tie_word_embeddings": True,
}

FAMILIES: Final[Mapping[str, Family]] = {  # by config.json's "architectures"
    "LlamaForCausalLM": Family("llama"),
    # A window of positions, in later models none (arXiv:2310.06825).
    "MistralForCausalLM": Family("llama", {"use_sliding_window": True, "sliding_window": 4096}),
    "MixtralForCausalLM": Family("mixtral", _MIXTRAL),
    # A bias on queries, keys and values (arXiv:2407.10671).
    "Qwen2ForCausalLM": Family("llama", _QWEN | {"attention_bias": True, "attention_output_bias": False}),
    "Qwen3ForCausalLM": Family("qwen3", _QWEN | {"head_dim": 128}),
    "Qwen3MoeForCausalLM": Family("qwen3_moe", _QWEN3_MOE),
    "Gemma2ForCausalLM": Family(
        "gemma2",
        _GEMMA | {"sliding_window_pattern": 2, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    ),
    "Gemma3ForCausalLM": Family(
        "gemma3", _GEMMA | {"sliding_window_pattern": 6, "rope_theta": 1e6, "rope_local_base_freq": 1e4}
    ),
    "Phi3ForCausalLM": Family(
        "phi3", {"use_sliding_window": True, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
    ),
    # Every fourth layer has no rotary positions (NoPE, arXiv:2501.18795).
    "SmolLM3ForCausalLM": Family(
        "llama", {"no_rope_layer_interval": 4, "rope_theta": 2e6, "tie_word_embeddings": True}
    ),
    "Olmo2ForCausalLM": Family("olmo2", {"rms_norm_eps": 1e-5}),
}


def builder(architecture: str) -> Callable[[ModelConfig, RankShard, ShardLoader], CausalLM]:
    """The function that builds one rank's part of a model of `architecture`."""
    if architecture not in FAMILIES:
        from ringlm.models.fallback import build

        return build
    from ringlm.models.layers import causal_lm

    return partial(causal_lm, importlib.import_module(f"ringlm.models.{FAMILIES[architecture].module}").block)

"""How layers attend, read from config.json, against what transformers makes of the same words."""

from __future__ import annotations

from typing import Any

import pytest

from ringlm.errors import ModelError
from ringlm.models.config import ModelConfig, read_config
from ringlm.models.kinds import NO_ROPE, AttentionKind, Rope

BASE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 4096,
}
TYPES = ["full_attention", "sliding_attention"] * 4
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("Mistral", {}),
    "mistral without": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"sliding_window": 100}),
    "qwen2 from a layer on": ("Qwen2", {"sliding_window": 100, "use_sliding_window": True, "max_window_layers": 3}),
    "qwen3 by names": ("Qwen3", {"sliding_window": 100, "use_sliding_window": True, "layer_types": TYPES}),
    "gemma2": ("Gemma2", {"query_pre_attn_scalar": 144}),
    "gemma2 by names": ("Gemma2", {"layer_types": TYPES, "sliding_window": 10, "final_logit_softcapping": None}),
    "gemma3": ("Gemma3", {"sliding_window": 512}),
    "gemma3, older words": (
        "Gemma3",
        {
            "sliding_window_pattern": 3,
            "rope_local_base_freq": 5000.0,
            "rope_theta": 7e5,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
    "gemma3, newer words": (
        "Gemma3",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 3e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
            }
        },
    ),
    "phi3": ("Phi3", {"sliding_window": 262144, "pad_token_id": None}),
    "smollm3": ("SmolLM3", {"pad_token_id": None}),
    "smollm3 by numbers": ("SmolLM3", {"pad_token_id": None, "no_rope_layers": [0, 1, 1, 1, 0, 1, 1, 1]}),
    "olmo2": ("Olmo2", {}),
}


def layers(config: ModelConfig) -> list[AttentionKind]:
    return [config.attention[index] for index in config.kind_of_layer]


@pytest.mark.parametrize("name", CASES)
def test_what_config_json_leaves_out_is_as_in_transformers(name: str) -> None:
    import transformers

    family, changes = CASES[name]
    words = BASE | changes
    theirs = getattr(transformers, f"{family}ForCausalLM").config_class(**words)
    ours = read_config(words | {"architectures": [f"{family}ForCausalLM"]})
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    types = getattr(theirs, "layer_types", None) or ["sliding_attention"] * 8  # all have a window, if there is one
    window = getattr(theirs, "sliding_window", None)
    turned = getattr(theirs, "no_rope_layers", [1] * 8)
    assert (ours.head_dim, ours.tied, ours.norm_eps) == (head_dim, theirs.tie_word_embeddings, theirs.rms_norm_eps)
    assert ours.activation == (getattr(theirs, "hidden_activation", None) or theirs.hidden_act)
    assert ours.logit_cap == getattr(theirs, "final_logit_softcapping", None)
    for layer, kind in enumerate(layers(ours)):
        assert kind.window == (window if types[layer] == "sliding_attention" else None)
        assert kind.scale == (getattr(theirs, "query_pre_attn_scalar", None) or head_dim) ** -0.5
        assert kind.soft_cap == getattr(theirs, "attn_logit_softcapping", None)
        rope = theirs.rope_parameters.get(types[layer], theirs.rope_parameters)
        assert (kind.rope == NO_ROPE) == (not turned[layer])
        if turned[layer]:
            assert (kind.rope.kind, kind.rope.theta) == (rope["rope_type"], rope["rope_theta"])
            assert kind.rope.factor == rope.get("factor", kind.rope.factor)


def rope_of(**words: Any) -> Rope:
    config = read_config(BASE | {"architectures": ["Phi3ForCausalLM"]} | words)
    return config.attention[0].rope


def test_older_words_for_longrope() -> None:
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    for kind in ("su", "yarn", "longrope"):
        rope = rope_of(rope_scaling={"type": kind} | factors, original_max_position_embeddings=1024)
        assert (rope.kind, rope.original_context, rope.long_factors) == ("longrope", 1024, (2.0,) * 8)
        assert rope.magnitude == pytest.approx(1.2**0.5)  # 1 + log(4) / log(1024)


def test_a_dynamic_rope_allows_a_longer_context() -> None:
    words = {"architectures": ["LlamaForCausalLM"], "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    assert read_config(BASE | words).context == 8192


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"layer_types": ["full_attention"] * 7}, "7 layer_types for 8 layers"),
        ({"layer_types": ["chunked_attention"] * 8}, "layer_types 'chunked_attention' is not supported"),
        ({"no_rope_layers": [1]}, "1 no_rope_layers for 8 layers"),
        ({"sliding_window": 0}, r"at `\$\.sliding_window`"),
        ({"query_pre_attn_scalar": 0}, r"at `\$\.query_pre_attn_scalar`"),
        ({"partial_rotary_factor": 0.7}, "0.7 of 16 dimensions have to be an even number"),
        ({"partial_rotary_factor": 1.5}, "1.5 of 16 dimensions have to be an even number"),
        ({"rope_scaling": {"type": "su", "short_factor": [1.0] * 8}}, "0 long_factor for 8 frequencies"),
        ({"rope_scaling": {"type": "yarn", "beta_fast": 1.0, "beta_slow": 2.0}}, r"must be below .* \(yarn: betas\)"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is not supported"),
    ],
)
def test_mistakes(words: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        rope_of(**words)

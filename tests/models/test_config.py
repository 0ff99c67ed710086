"""config.json: what is read from it, and how mistakes in it are named."""

from __future__ import annotations

from typing import Any

import pytest

from ringlm.errors import ModelError
from ringlm.models.config import read_config

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
}


def test_defaults() -> None:
    config = read_config(BASE)
    assert (config.kv_heads, config.head_dim, config.context) == (4, 16, 2048)
    assert (config.attention[0].rope.theta, config.attention[0].rope.kind) == (10000.0, "default")
    assert (config.tied, config.qkv_bias, config.output_bias, config.eos_token_ids) == (False, False, False, ())


def test_old_and_new_words_for_the_rope() -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    old = read_config(BASE | {"rope_theta": 5e5, "rope_scaling": scaling | {"type": "llama3"}})
    new = read_config(BASE | {"rope_parameters": scaling | {"rope_type": "llama3", "rope_theta": 5e5}})
    assert old == new
    assert old.attention[0].rope.original_context == 64


def test_end_of_text_tokens() -> None:
    assert read_config(BASE | {"eos_token_id": 2}).eos_token_ids == (2,)
    assert read_config(BASE | {"eos_token_id": [5, 7]}).eos_token_ids == (5, 7)


def test_sizes_that_a_plan_divides() -> None:
    found = read_config(BASE | {"num_key_value_heads": 2}, "tiny")
    assert (found.query_heads, found.kv_heads, found.columns, found.vocabulary) == (4, 2, 96, 100)
    assert (found.name, found.context, found.layers) == ("tiny", 2048, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["NewForCausalLM"], "vocab_size": None},
            "NewForCausalLM is not a family known here: Expected",
        ),
        ({"architectures": []}, "architecture None is not known; known are LlamaFor"),
        ({"architectures": [["x"]]}, "is not known"),
        ({"hidden_size": "64"}, r"Expected `int`, got `str` - at `\$\.hidden_size`"),
        ({"vocab_size": 0}, r"at `\$\.vocab_size`"),
        ({"num_hidden_layers": 1 << 40}, r"at `\$\.num_hidden_layers`"),
        ({"max_position_embeddings": 1 << 40}, r"at `\$\.max_position_embeddings`"),
        ({"num_key_value_heads": 3}, "4 num_attention_heads cannot share 3 num_key_value_heads"),
        ({"head_dim": 15}, "head_dim 15 has to be even"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"rope_scaling": {"rope_type": "axial"}}, "rope type 'axial' is not supported; default, linear"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.0}}, "its factor above 0"),
        ({"rope_theta": 1.0}, "theta must be above 1"),
        ({"rope_scaling": {"rope_type": "factors", "factors": [1.0]}}, "1 factors for 8 frequencies"),
        ({"rope_scaling": {"rope_type": "llama3", "low_freq_factor": 4.0}}, "low_freq_factor must be below"),
    ],
)
def test_mistakes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read_config(BASE | changes)


@pytest.mark.parametrize("field", ["hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"])
def test_missing_fields(field: str) -> None:
    with pytest.raises(ModelError, match=f"missing required field `{field}`"):
        read_config({key: value for key, value in BASE.items() if key != field})

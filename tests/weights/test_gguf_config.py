"""What GGUF's metadata say, and what they leave to each architecture, as config.json's words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from ringlm.errors import ModelError
from ringlm.models.config import ModelConfig, read_config
from ringlm.weights import open_model
from tests.weights.write_gguf import finish


def read(folder: Path, arch: str, layers: int = 3, **metadata: Any) -> ModelConfig:
    """The configuration of a model of width 96 with 8 heads of 16 dimensions, and nothing in it but an embedding."""
    writer = gguf.GGUFWriter(folder / "model.gguf", arch)
    writer.add_block_count(layers)
    writer.add_context_length(64)
    writer.add_embedding_length(96)
    writer.add_feed_forward_length(10)
    writer.add_head_count(8)
    writer.add_layer_norm_rms_eps(1e-5)
    if arch != "phi3":
        writer.add_key_length(16)
    for name, value in metadata.items():
        key = f"{arch}.{name.replace('__', '.')}"
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
        add[type(value)](key, value)
    writer.add_tensor("token_embd.weight", np.zeros((7, 96), np.float32))
    finish(writer)
    return read_config(open_model(folder / "model.gguf").config)


def windows(config: ModelConfig) -> list[int | None]:
    return [config.attention[kind].window for kind in config.kind_of_layer]


@pytest.mark.parametrize(("arch", "largest"), [("gemma2", 46), ("gemma3", 62)])
def test_the_largest_gemmas_scale_scores_by_the_width_of_a_head_in_the_residual(
    tmp_path: Path, arch: str, largest: int
) -> None:
    assert read(tmp_path, arch).attention[0].scale == 16**-0.5
    assert read(tmp_path, arch, layers=largest).attention[0].scale == 12**-0.5


def test_windows_of_gemmas(tmp_path: Path) -> None:
    assert windows(read(tmp_path, "gemma2", layers=4)) == [4096, None, 4096, None]
    assert windows(read(tmp_path, "gemma3", layers=7, attention__sliding_window=9)) == [9] * 5 + [None, 9]
    found = read(tmp_path, "gemma3", attention__sliding_window=9, attention__sliding_window_pattern=[False, True, True])
    assert windows(found) == [None, 9, 9]
    found = read(tmp_path, "gemma3", attention__sliding_window=9, attention__sliding_window_pattern=2)
    assert windows(found) == [9, None, 9]


def test_soft_caps_and_ropes_of_gemmas(tmp_path: Path) -> None:
    found = read(tmp_path, "gemma2", attn_logit_softcapping=20.0)
    assert (found.attention[0].soft_cap, found.logit_cap, found.norm_offset) == (20.0, 30.0, 0.0)
    found = read(tmp_path, "gemma3", rope__freq_base=1e6, rope__scaling__factor=8.0, attention__sliding_window=9)
    (local,) = {kind.rope for kind in found.attention}
    assert (local.theta, local.kind) == (1e4, "default")
    found = read(tmp_path, "gemma3", layers=6, rope__freq_base=1e6, rope__scaling__factor=8.0)
    assert [(kind.rope.theta, kind.rope.factor) for kind in found.attention] == [(1e4, 1.0), (1e6, 8.0)]


def test_a_part_of_each_of_phi3s_heads_turns(tmp_path: Path) -> None:
    found = read(tmp_path, "phi3", rope__dimension_count=8, attention__sliding_window=0)
    assert (found.head_dim, found.attention[0].rope.partial, windows(found)) == (12, 8 / 12, [None] * 3)


def test_olmo_3_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="OLMo 3 is not supported"):
        read(tmp_path, "olmo2", attention__sliding_window=4096)

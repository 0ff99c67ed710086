"""Models for benchmarks: in both formats they are read, and are the same model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import make_model
from ringlm.models.config import read_config
from ringlm.models.rope import frequencies
from ringlm.weights.files import open_model

SHAPES = {
    "llama": make_model.Shape(64, 128, 2, 4, 2, 16, 320, 500000.0, llama3=True),
    "qwen3_moe": make_model.Shape(64, 32, 2, 4, 2, 16, 320, 1e6, experts=4, chosen=2),
    "gemma3_text": make_model.Shape(64, 128, 6, 4, 1, 16, 320, 1e6, window=8),
}


@pytest.mark.parametrize("family", SHAPES)
def test_a_folder_and_a_file_are_of_one_model(family: str, tmp_path: Path) -> None:
    shape = SHAPES[family]
    make_model.write_folder(shape, tmp_path / "model")
    make_model.write_gguf(shape, tmp_path / "model.gguf", "Q8_0", "model")
    folder, file = (open_model(tmp_path / name) for name in ("model", "model.gguf"))
    ours, theirs = read_config(folder.config), read_config(file.config)
    assert ours.architecture == theirs.architecture
    assert ours.kind_of_layer == theirs.kind_of_layer
    for one, other in zip(ours.attention, theirs.attention, strict=True):
        found, expected = (frequencies(kind.rope, shape.head_dim, 8192) for kind in (other, one))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)

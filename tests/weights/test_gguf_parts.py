"""GGUF models in several files: read as one, whichever part is named, and refused where a part does not fit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from ringlm.errors import ModelError
from ringlm.frontend.model import resolve
from ringlm.weights import open_model
from tests.models.reference import save
from tests.weights.write_gguf import write_model


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    original = save(folder / "original")
    (folder / "parts").mkdir()
    write_model(original, folder / "parts" / "model.gguf", in_a_part=8)
    return write_model(original, folder / "model.gguf")


@pytest.fixture
def parts(whole: Path, tmp_path: Path) -> list[Path]:
    """Three files of one model, to be damaged."""
    shutil.copytree(whole.parent / "parts", tmp_path / "model")
    return sorted((tmp_path / "model").iterdir())


def test_any_part_and_the_folder_mean_the_whole(whole: Path, parts: list[Path]) -> None:
    one = open_model(whole)
    assert len(parts) == 3
    for path in (*parts, parts[0].parent):
        found = open_model(path)
        assert (found.fingerprint, found.config) == (one.fingerprint, one.config)
        assert set(found.tensors.names()) == set(one.tensors.names())
        assert resolve(str(path)).name == one.name
    for name in one.tensors.names():
        assert torch.equal(found.tensors.read(name), one.tensors.read(name))
    assert found.tensors.place("lm_head.weight") == f"{parts[2].name}: tensor 'lm_head.weight'"


def test_a_missing_part_is_named(parts: list[Path]) -> None:
    parts[1].unlink()
    for path in (parts[0], parts[2], parts[0].parent):
        with pytest.raises(ModelError, match=r"^model-00002-of-00003\.gguf: is missing beside model-0000\d-of-00003"):
            open_model(path)


def test_a_part_that_is_another_is_refused(parts: list[Path]) -> None:
    shutil.copy(parts[2], parts[1])
    with pytest.raises(ModelError, match=r"^model-00002-of-00003\.gguf: is not what its name says, part 2\."):
        open_model(parts[0])


def test_a_part_under_another_name_is_refused(parts: list[Path]) -> None:
    alone = parts[0].rename(parts[0].with_name("renamed.gguf"))
    with pytest.raises(ModelError, match=r"^renamed\.gguf: is one of 3 parts by its metadata and of 1 by its name\."):
        open_model(alone)
    with pytest.raises(ModelError, match=r"part 4 of 3 cannot be"):
        open_model(parts[1].rename(parts[1].with_name("model-00004-of-00003.gguf")))


def test_a_truncated_part_is_named(parts: list[Path]) -> None:
    parts[1].write_bytes(parts[1].read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"^model-00002-of-00003\.gguf: tensor '[\w.]+' ends at byte"):
        open_model(parts[0])

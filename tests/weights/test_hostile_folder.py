"""Damaged and hostile folders: a ModelError that names the file, nothing run, nothing waited for; or a model."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ringlm.errors import ConfigError, ModelError
from ringlm.parallel.communicator import Alone
from ringlm.weights import open_model
from ringlm.weights.packed import BLOCK
from tests.models.reference import load, save
from tests.weights.write_gguf import write_model
from tests.weights.write_quantized import METHODS, SIZES, write

SMALL = SIZES | {"num_hidden_layers": 1, "vocab_size": 64}
FORMATS = ["plain", "gguf", "gguf parts", "gptq with zeros", "gptq by activations", "awq", "mlx", "fp8 by blocks"]


@pytest.fixture(scope="module", params=FORMATS)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small valid model in each format."""
    folder = tmp_path_factory.mktemp("whole")
    if request.param in METHODS:
        return write(folder, METHODS[request.param], **SMALL)[0]
    model = save(folder / "model", **SMALL, shard="300KB")
    if request.param == "plain":
        return model
    (folder / "gguf").mkdir()
    parts = 5 if request.param == "gguf parts" else 0
    return write_model(model, folder / "gguf" / "model.gguf", default="Q8_0", in_a_part=parts).parent


def read_all(folder: Path) -> None:
    """All that a loader might do."""
    files = open_model(folder)
    for name in files.tensors.names():
        shape = files.tensors.shape(name)
        files.tensors.place(name)
        files.tensors.read(name, dtype=torch.float32)
        if len(shape) == 2:
            files.tensors.packed(name, slice(0, shape[0]), slice(0, shape[1] // BLOCK))
    load(files, Alone(), context=8)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_anywhere_raises_nothing_but_our_errors(whole: Path, tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    path = data.draw(st.sampled_from(sorted(folder.iterdir())))
    content = bytearray(path.read_bytes())
    end = data.draw(st.sampled_from([len(content), 4000]))  # headers are at the beginning
    flips = st.tuples(st.integers(0, min(end, len(content)) - 1), st.integers(0, 255))
    for place, value in data.draw(st.lists(flips, max_size=6)):
        content[place] = value
    kept = data.draw(st.none() | st.integers(0, len(content)))
    path.write_bytes(content[:kept])
    with contextlib.suppress(ModelError, ConfigError):
        read_all(folder)


def test_what_is_whole_loads(whole: Path) -> None:
    read_all(whole)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "generation_config.json"])
def test_a_link_out_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    folder = save(tmp_path / "model", **SMALL)
    shutil.move(folder / name, tmp_path / "outside")
    (folder / name).symlink_to(tmp_path / "outside")
    with pytest.raises(ModelError, match=rf"^{name}: is a symbolic link to .*outside, outside the model's folder"):
        open_model(folder)
    shutil.move(tmp_path / "outside", folder / "inside")
    (folder / name).unlink()
    (folder / name).symlink_to("inside")
    open_model(folder)
    (tmp_path / "link").symlink_to(folder)
    open_model(tmp_path / "link")


def test_the_links_of_the_hub_s_cache(tmp_path: Path) -> None:
    cached = tmp_path / "models--owner--name"
    folder = save(cached / "snapshots" / "0123abcd", **SMALL)
    (cached / "blobs").mkdir()
    for path in list(folder.iterdir()):
        shutil.move(path, cached / "blobs" / path.name)
        path.symlink_to(Path("..", "..", "blobs", path.name))
    open_model(folder)
    shutil.move(cached / "blobs" / "model.safetensors", tmp_path / "another")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(tmp_path / "another")
    with pytest.raises(ModelError, match=r"^model\.safetensors: is a symbolic link"):
        open_model(folder)


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", **SMALL)
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(ModelError, match=r"^config\.json: is not a file"):
        open_model(folder)
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("config.json")
    with pytest.raises(ModelError, match=r"^config\.json: cannot be read"):
        open_model(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_deep_brackets(tmp_path: Path, name: str) -> None:
    folder = save(tmp_path / "model", **SMALL)
    (folder / name).write_text('{"weight_map":' + "[" * 200_000)
    with pytest.raises(ModelError, match=rf"^{name}: is not a"):
        open_model(folder)


def test_a_name_of_a_file_that_no_system_takes(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", **SMALL)
    for name in ("x" * 5000, "\0"):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"t": name}}))
        with pytest.raises(ModelError, match=r"is missing, and model\.safetensors\.index\.json has tensor 't' in it"):
            open_model(folder)


def test_code_in_the_folder_is_not_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = save(tmp_path / "model", **SMALL)
    (folder / "modeling_evil.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Evil"}
    (folder / "config.json").write_text(json.dumps(config))
    with caplog.at_level("INFO", "ringlm"):
        read_all(folder)
    assert "is not run" in caplog.text
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["EvilForCausalLM"]}))
    with pytest.raises(ModelError, match=r"'EvilForCausalLM' .* is not known, .* is never run"):
        read_all(folder)
    assert not (tmp_path / "run").exists()

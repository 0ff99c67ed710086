"""Hugging Face folders: slices equal the tensor's, and every damage is named."""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ringlm.errors import ModelError
from ringlm.ring.handshake import differing
from ringlm.weights import open_model
from tests.models.reference import save

CONFIG = {"architectures": ["LlamaForCausalLM"]}


def folder_with(path: Path, tensors: dict[str, torch.Tensor], file: str = "model.safetensors") -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors, path / file)
    return path


def raw(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return struct.pack("<Q", len(text)) + text + data


def index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_slices(tmp_path: Path, dtype: torch.dtype) -> None:
    matrix, vector = torch.randn(7, 11).to(dtype), torch.randn(5).to(dtype)
    source = open_model(folder_with(tmp_path / "m", {"matrix": matrix, "vector": vector})).tensors
    assert sorted(source.names()) == ["matrix", "vector"]
    assert source.shape("matrix") == (7, 11)
    assert source.nbytes == matrix.nbytes + vector.nbytes
    for rows, columns in ((None, None), (slice(2, 5), None), (None, slice(3, 9)), (slice(1, 7), slice(0, 1))):
        got = source.read("matrix", rows, columns)
        assert torch.equal(got, matrix[rows or slice(None), columns or slice(None)])
        assert got.is_contiguous()
        assert got.dtype == dtype
    assert torch.equal(source.read("vector", slice(1, 4), dtype=torch.float32), vector[1:4].float())
    with pytest.raises(ValueError, match="is not a part of 7"):
        source.read("matrix", slice(2, 8))


def test_what_is_read_is_no_longer_the_files(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "m", {"t": torch.ones(4)})
    got = open_model(folder).tensors.read("t")
    got.add_(1)
    assert torch.equal(open_model(folder).tensors.read("t"), torch.ones(4))


def test_truncated(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "m", {"a": torch.ones(4), "b": torch.ones(100)})
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-50])
    message = rf"^model\.safetensors: tensor 'b' ends at byte {len(whole)}, the file at {len(whole) - 50}\. Download"
    with pytest.raises(ModelError, match=message):
        open_model(folder)
    for size in (0, 5, 8, 30):
        path.write_bytes(whole[:size])
        with pytest.raises(ModelError, match=r"^model\.safetensors: its header ends at byte [\d,]+, the file at \d+\."):
            open_model(folder)


HEADERS = {
    "a header longer than memory": (struct.pack("<Q", (1 << 63) - 1) + bytes(64), "its header ends at byte"),
    "not JSON": (raw(b"{oops"), "its header is damaged"),
    "a list": (raw([]), "its header is damaged"),
    "no offsets": (raw({"t": {"dtype": "F32", "shape": [1]}}), "its header is damaged"),
    "an unknown type": (
        raw({"t": {"dtype": "F8_E5M2", "shape": [4], "data_offsets": [0, 4]}}, bytes(4)),
        "tensor 't' is of type F8_E5M2; supported are",
    ),
    "a wrong length": (
        raw({"t": {"dtype": "F32", "shape": [4], "data_offsets": [0, 4]}}, bytes(4)),
        "has the shape [4]",
    ),
    "a negative offset": (raw({"t": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}), "has the shape [1]"),
    "a negative size": (raw({"t": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}), "has the shape [-1]"),
    "a huge shape": (
        raw({"t": {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 1 << 60]}}),
        "tensor 't' has the shape",
    ),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_damaged_headers(tmp_path: Path, name: str) -> None:
    content, message = HEADERS[name]
    folder = folder_with(tmp_path / "m", {})
    (folder / "model.safetensors").write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(ModelError) as caught:
            open_model(folder)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()
    assert str(caught.value).startswith("model.safetensors: ")
    assert message in str(caught.value)


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", ""])
def test_an_index_that_leaves_the_folder(tmp_path: Path, file: str) -> None:
    folder = folder_with(tmp_path / "m", {"t": torch.ones(1)})
    save_file({"t": torch.ones(1)}, tmp_path / "model.safetensors")
    index(folder, {"t": file})
    with pytest.raises(ModelError, match=r"index\.json: names '.*', which is not a file of this folder"):
        open_model(folder)


def test_an_index_that_does_not_fit(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "m", {"a": torch.ones(1)}, "model-00001-of-00002.safetensors")
    index(folder, {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"})
    with pytest.raises(
        ModelError, match=r"^model-00002-of-00002\.safetensors: is missing, and .* has tensor 'b' in it"
    ):
        open_model(folder)
    save_file({"c": torch.ones(1)}, folder / "model-00002-of-00002.safetensors")
    with pytest.raises(ModelError, match=r"^model-00002-of-00002\.safetensors: tensor 'b' is missing"):
        open_model(folder)
    index(folder, ["a"])
    with pytest.raises(ModelError, match=r"index\.json: is not an index"):
        open_model(folder)


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(ModelError, match=r"only as pickles \(pytorch_model\.bin\).*save_pretrained"):
        open_model(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00"])
def test_a_configuration_that_is_none(tmp_path: Path, text: str) -> None:
    folder = folder_with(tmp_path / "m", {"t": torch.ones(1)})
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"^config\.json: is not a JSON object"):
        open_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        open_model(folder)


def test_no_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"holds neither model\.safetensors nor"):
        open_model(tmp_path)


def test_the_fingerprint(tmp_path: Path) -> None:
    one = open_model(save(tmp_path / "a" / "model")).fingerprint
    assert one.startswith("model:configuration=")
    assert open_model(save(tmp_path / "b" / "model", shard="10KB")).fingerprint == one, "files are only a wrapping"
    other = open_model(save(tmp_path / "c" / "model", seed=1)).fingerprint
    assert differing(one, other) == ["weights"]
    path = tmp_path / "a" / "model" / "config.json"
    path.write_text(path.read_text().replace("1e-06", "1e-05"))
    assert differing(one, open_model(path.parent).fingerprint) == ["configuration"]
    renamed = (tmp_path / "b" / "model").rename(tmp_path / "b" / "other")
    assert differing(one, open_model(renamed).fingerprint) == []
    taller = open_model(save(tmp_path / "d" / "model", vocab_size=132)).fingerprint
    assert differing(one, taller) == ["configuration", "shapes", "weights"]


def test_the_tokens_that_end_an_answer(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "m", {"t": torch.ones(1)})
    assert "eos_token_id" not in open_model(folder).config
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    assert open_model(folder).config["eos_token_id"] == [5, 7]


def test_tensors_between_words(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "m", {})
    values = torch.randn(6)
    entry = {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}
    for blank in range(4):
        header = json.dumps({"t": entry}).encode() + b" " * blank
        (folder / "model.safetensors").write_bytes(raw(header, values.numpy().tobytes()))
        assert torch.equal(open_model(folder).tensors.read("t", slice(1, 5)), values[1:5])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_pages_are_let_go_once_they_are_copied(tmp_path: Path) -> None:
    source = open_model(folder_with(tmp_path / "m", {"t": torch.ones(32_768, 256)})).tensors  # 32 MB
    before = mapped_bytes()
    assert source.read("t", columns=slice(0, 1)).sum() == 32_768  # touches every page
    assert mapped_bytes() - before < 8_000_000


def mapped_bytes() -> int:
    """Of files, resident in this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssFile")).split()[1]) * 1024

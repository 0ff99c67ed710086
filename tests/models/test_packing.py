"""Packed models: near the model whose weights they stand for, at every world size, and mapped the second time."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ringlm.errors import ConfigError
from ringlm.models import shard_file
from ringlm.models.batch import Batch
from ringlm.models.packing import Layout, layout_of
from ringlm.models.shard_file import ShardFile, ShardWriter, shard_path
from ringlm.parallel.communicator import Communicator
from ringlm.ring import Ring
from ringlm.weights import ModelFiles, open_model
from ringlm.weights.packed import quantize, unpack
from tests.models.reference import load, logits_of, prompt, save
from tests.parallel.local import run_ranks
from tests.ring.helpers import each, thread_ring
from tests.weights.write_gguf import write_model

TOKENS = prompt(40, seed=3)


SIZES: dict[str, Any] = {"hidden_size": 72, "head_dim": 20, "num_attention_heads": 6}
EXPERTS = {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 51, "mlp_only_layers": [0]}


@pytest.fixture(scope="module", params=["Llama", "Qwen3Moe"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads and columns that blocks of 32 never fit, and layers enough to matter."""
    folder = tmp_path_factory.mktemp("packed") / "odd"
    changes = SIZES | {"intermediate_size": 150, "attention_bias": True}
    return save(folder, family=request.param, **changes, **(EXPERTS if request.param == "Qwen3Moe" else {}))


class Quantized:
    """A model's tensors as packing leaves them: what the packed model computes with, in float32."""

    def __init__(self, files: ModelFiles, bits: int) -> None:
        self._source, self._bits = files.tensors, bits

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def read(self, name: str, rows: Any = None, columns: Any = None, dtype: Any = None) -> Tensor:
        if columns is None or name.endswith(".mlp.gate.weight"):  # a router stays in floats
            return self._source.read(name, rows, columns, dtype)
        height, width = self._source.shape(name)
        whole = self._source.read(name, slice(0, height), slice(0, width), torch.float32)
        bits = 8 if name in ("model.embed_tokens.weight", "lm_head.weight") else self._bits
        return unpack(quantize(whole, bits))[:, :width][rows, columns]


def logits(files: ModelFiles, world_size: int, pieces: list[int], **options: Any) -> Tensor:
    """Of every position of TOKENS, fed in pieces of these lengths; the same on every rank."""

    def rank(comm: Communicator) -> Tensor:
        loaded = load(files, comm, **options)
        cache, parts, first = loaded.new_cache(1), [], 0
        for length in pieces:
            batch = Batch.of([(TOKENS[first : first + length], first, [0])], list(range(length)), loaded.device)
            parts.append(logits_of(loaded, comm, batch, cache).clone())
            first += length
        return torch.cat(parts)

    results = run_ranks(world_size, rank)
    assert all(torch.equal(result, results[0]) for result in results)
    return results[0]


def apart(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_packed_model_is_near_the_one_it_stands_for(model: Path, bits: int, world_size: int) -> None:
    files = open_model(model)
    exact = logits(
        ModelFiles(**(vars(files) | {"tensors": Quantized(files, bits)})), 1, [40]
    )  # the same weights; activations are not rounded to 8 bits
    assert apart(logits(files, world_size, [40], bits=bits), exact) < 0.06
    assert apart(logits(files, world_size, [7, 30, 1, 1, 1], bits=bits), exact) < 0.06


def on_accelerators(device: torch.device) -> Layout:
    """The layout of an accelerator, whatever the device."""
    return layout_of(torch.device("cuda"))


NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=NO_CUDA)])
def accelerator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device that models are packed on as on accelerators."""
    monkeypatch.setattr("ringlm.models.loader.layout_of", on_accelerators)
    return torch.device(request.param)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("bits", [4, 8])
def test_on_an_accelerator_a_packed_model_is_the_one_it_stands_for(
    model: Path, bits: int, world_size: int, accelerator: torch.device
) -> None:
    files = open_model(model)
    exact = logits(ModelFiles(**(vars(files) | {"tensors": Quantized(files, bits)})), 1, [40])
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.06)):
        for pieces in ([40], [7, 30, 1, 1, 1]):
            found = logits(files, world_size, pieces, bits=bits, dtype=dtype, device=accelerator)
            assert apart(found, exact) < tolerance


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_on_an_accelerator_the_codes_of_a_gguf_file_are_taken_as_they_are(
    kind: str, tmp_path: Path, accelerator: torch.device
) -> None:
    folder = save(tmp_path / "model", hidden_size=96, head_dim=16, intermediate_size=160, num_attention_heads=6)
    files = open_model(write_model(folder, tmp_path / "model.gguf", default=kind))
    exact = logits(files, 1, [40])
    for world_size in (1, 3):
        found = logits(files, world_size, [38, 1, 1], bits=8 if kind == "Q8_0" else 4, device=accelerator)
        assert apart(found, exact) < 1e-5


@NO_CUDA
@pytest.mark.parametrize("bits", [4, 8])
def test_a_cpu_and_a_cuda_rank_make_one_packed_model(model: Path, bits: int) -> None:
    files = open_model(model)
    exact = logits(ModelFiles(**(vars(files) | {"tensors": Quantized(files, bits)})), 1, [40])

    def rank(ring: Ring) -> Tensor:
        loaded = load(files, ring, bits=bits, device=torch.device(("cpu", "cuda")[ring.rank]))
        batch = Batch.of([(TOKENS, 0, [0])], list(range(40)), loaded.device)
        return logits_of(loaded, ring, batch, loaded.new_cache(1))

    with thread_ring(2) as rings:
        first, second = each(rings, rank)
    assert torch.equal(first, second)
    assert apart(first, exact) < 0.06  # the CPU rounds activations to 8 bits


def test_the_shards_of_layouts_are_kept_apart(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(shard_file.LIMIT_VARIABLE, "1")
    files = open_model(model)
    logits(files, 1, [40], bits=4)
    monkeypatch.setattr("ringlm.models.loader.layout_of", on_accelerators)
    first = logits(files, 1, [40], bits=4)
    assert len(list((tmp_path / "ringlm" / "shards").iterdir())) == 2
    monkeypatch.setattr("ringlm.models.packing.quantize", _refuse_rows)
    assert torch.equal(logits(files, 1, [40], bits=4), first)


def test_fewer_bits_are_further_from_the_original(model: Path) -> None:
    files = open_model(model)
    original = logits(files, 1, [40])
    four, eight = (apart(logits(files, 1, [40], bits=bits), original) for bits in (4, 8))
    assert eight < 0.06 < four < 0.6


def test_the_second_load_maps_what_the_first_packed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(shard_file.LIMIT_VARIABLE, "1")
    files = open_model(model)
    first = logits(files, 2, [40], bits=4)
    kept = sorted((tmp_path / "ringlm" / "shards").iterdir())
    assert len(kept) == 2
    monkeypatch.setattr("ringlm.models.packing.quantize", _refuse_rows)
    assert torch.equal(logits(files, 2, [40], bits=4), first)
    kept[0].write_bytes(kept[0].read_bytes()[:-100])
    with pytest.raises(AssertionError, match="quantized again"):
        logits(files, 2, [40], bits=4)
    os.utime(model / "model.safetensors", ns=(1, 1))  # changed since: other weights, perhaps
    with pytest.raises(AssertionError, match="quantized again"):
        logits(open_model(model), 1, [40], bits=4)


def _refuse_rows(weight: Tensor, bits: int) -> Any:
    assert not len(weight), "quantized again"
    return quantize(weight, bits)


def layout(size: int) -> dict[str, Tensor]:
    return {"a": torch.arange(size, dtype=torch.uint8), "b": torch.ones(3, dtype=torch.float16)}


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    writer = ShardWriter(path, tensors)
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.finish()


def test_the_shards_that_were_used_longest_ago_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(shard_file.LIMIT_VARIABLE, str(1000e-9))
    first, second, third = (shard_path(number) for number in range(3))
    write(first, layout(250))
    write(second, layout(250))
    os.utime(second, (1, 1))
    assert ShardFile.find(first, layout(250)) is not None
    write(third, layout(250))
    assert [path.exists() for path in (first, second, third)] == [True, False, True]
    write(second, {"a": torch.zeros(5000, dtype=torch.uint8)})
    assert not second.exists()  # more than the cache holds


def test_an_unfinished_shard_never_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(shard_file.LIMIT_VARIABLE, "1")
    path = shard_path("x")
    writer = ShardWriter(path, layout(10))
    writer.write("a", layout(10)["a"])
    writer.finish()
    assert list(path.parent.iterdir()) == []
    write(path, layout(10))
    assert ShardFile.find(path, layout(11)) is None  # of another plan
    found = ShardFile.find(path, layout(10))
    assert found is not None
    assert time.time() - path.stat().st_mtime < 60


def test_a_limit_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(shard_file.LIMIT_VARIABLE, "lots")
    with pytest.raises(ConfigError, match="'lots'; give gigabytes"):
        shard_file.cache_limit()

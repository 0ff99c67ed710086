"""What a plan says a rank will hold is what it then holds, to the byte."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ringlm.models.config import read_config
from ringlm.models.loader import load_model
from ringlm.models.sizes import Holding, holdings
from ringlm.parallel.communicator import Communicator
from ringlm.parallel.shard import plan_shards
from ringlm.weights import ModelFiles, open_model
from tests.models.reference import save
from tests.models.test_families import MODELS
from tests.parallel.local import run_ranks
from tests.weights.write_gguf import write_model

SPLITS = [(1, None), (2, None), (3, (2.0, 1.0, 0.0)), (5, None), (5, (5.0, 1.0, 1.0, 2.0, 1.0))]
FORMS = [("float32", None), ("bfloat16", None), ("float32", 8), ("float32", 4)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelFiles]:
    """Odd sizes with biases and a head of its own; tied; and files that hold codes of several forms."""
    folder = tmp_path_factory.mktemp("sizes")
    odd = save(folder / "odd", hidden_size=72, head_dim=20, intermediate_size=150, attention_bias=True, mlp_bias=True)
    even = save(
        folder / "even",
        hidden_size=96,
        num_attention_heads=6,
        head_dim=32,
        intermediate_size=160,
        tie_word_embeddings=True,
    )
    kinds = {"v_proj": "Q8_0", "down_proj": "Q5_1", "embed_tokens": "Q5_0", "up_proj": "Q4_1", "gate_proj": "F16"}
    mixed = write_model(even, folder / "mixed.gguf", types=kinds, default="Q4_0")
    return {path.name: open_model(path) for path in (odd, even, mixed)}


def held(planned: list[Holding]) -> list[tuple[int, int]]:
    return [(one.weights, one.block) for one in planned]


def loaded(
    files: ModelFiles, world_size: int, split: tuple[float, ...] | None, dtype: str, bits: int | None
) -> list[tuple[int, int]]:
    plan = plan_shards(read_config(files.config), world_size, split)

    def rank(comm: Communicator) -> tuple[int, int]:
        model = load_model(
            files, plan, comm.rank, comm, device=torch.device("cpu"), dtype=getattr(torch, dtype), context=70, bits=bits
        )
        return model.nbytes, model.new_cache(1).nbytes

    return run_ranks(world_size, rank)


@pytest.mark.parametrize(("dtype", "bits"), FORMS)
@pytest.mark.parametrize(("world_size", "split"), SPLITS)
@pytest.mark.parametrize("name", ["odd", "even", "mixed.gguf"])
def test_it_is_what_is_loaded(
    models: dict[str, ModelFiles],
    name: str,
    world_size: int,
    split: tuple[float, ...] | None,
    dtype: str,
    bits: int | None,
) -> None:
    files = models[name]
    plan = plan_shards(read_config(files.config), world_size, split)
    planned = holdings(files, plan, ["cpu"] * world_size, dtype=dtype, bits=bits)
    assert held(planned) == loaded(files, world_size, split, dtype, bits)


@pytest.mark.parametrize("name", MODELS)
def test_every_family(name: str, tmp_path: Path) -> None:
    family, changes = MODELS[name]
    files = open_model(save(tmp_path / "model", family=family, **changes))
    plan = plan_shards(read_config(files.config), 3)
    for dtype, bits in FORMS:
        planned = holdings(files, plan, ["cpu"] * 3, dtype=dtype, bits=bits)
        assert held(planned) == loaded(files, 3, None, dtype, bits), (dtype, bits)


def test_rows_on_an_accelerator_are_not_padded(models: dict[str, ModelFiles], monkeypatch: pytest.MonkeyPatch) -> None:
    from ringlm.models.packing import layout_of

    layout = layout_of(torch.device("cuda"))
    monkeypatch.setattr("ringlm.models.loader.layout_of", lambda device: layout)
    files = models["odd"]
    plan = plan_shards(read_config(files.config), 3)
    planned = holdings(files, plan, ["cuda"] * 3, dtype="float32", bits=4)
    assert held(planned) == loaded(files, 3, None, "float32", 4)
    assert planned != holdings(files, plan, ["cpu"] * 3, dtype="float32", bits=4)


def test_a_step_reads_the_experts_that_it_takes_and_no_embedding(tmp_path: Path) -> None:
    changes = {"num_experts": 7, "num_experts_per_tok": 2, "moe_intermediate_size": 21}
    sizes = {}
    for name, tied in (("tied", True), ("untied", False)):
        files = open_model(save(tmp_path / name, family="Qwen3Moe", tie_word_embeddings=tied, **changes))
        config = read_config(files.config)
        (sizes[tied],) = holdings(files, plan_shards(config, 1), ["cpu"], dtype="float32", bits=None)
    assert config.mixture is not None
    experts = 4 * 3 * config.layers * config.hidden_size * config.mixture.columns
    unused = experts * (config.mixture.experts - config.mixture.chosen)
    assert sizes[True].weights - sizes[True].step == unused
    assert sizes[False].weights - sizes[False].step == unused + 4 * config.vocabulary * config.hidden_size


@pytest.mark.parametrize("name", ["even", "mixed.gguf"])
def test_a_form_is_told_without_reading(models: dict[str, ModelFiles], name: str) -> None:
    tensors = models[name].tensors
    for tensor in tensors.names():
        packed = tensors.packed(tensor, slice(0, 0), slice(0, 0))
        told = tensors.form(tensor) if len(tensors.shape(tensor)) == 2 else None
        assert told == (None if packed is None else (packed.bits, packed.minimums is not None))
        if packed is not None:
            row = tensors.packed(tensor, slice(0, 1), slice(0, 1))
            assert told is not None
            assert told.nbytes == sum(part.nbytes for part in row[1:] if part is not None)

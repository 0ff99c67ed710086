"""Sharded adapters answer as the model does into which they are merged."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from ringlm.errors import ModelError
from ringlm.models.config import read_config
from ringlm.models.loader import ShardLoader, load_model
from ringlm.models.shard_file import LIMIT_VARIABLE
from ringlm.models.sizes import holdings
from ringlm.parallel.communicator import Alone, Communicator
from ringlm.parallel.shard import plan_shards
from ringlm.weights import ModelFiles, open_model
from tests.models.reference import Greedy, assert_same, expected, generate, load, prompt, save
from tests.parallel.local import run_ranks
from tests.weights.write_adapter import merge, save_adapter
from tests.weights.write_gguf import write_model

RANKS = {"q_proj": 3, "down_proj": 2}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], Any]] = {
    "llama": ("Llama", {}, {}, 1.5),
    "llama with patterns": (
        "Llama",
        {"num_hidden_layers": 1},
        {
            "ranks": RANKS,
            "alpha_pattern": {"self_attn.[q]_proj": 2, "layers.1.mlp": 9},
            "targets": "q_proj|v_proj|down",
        },
        {"q_proj": 2 / 3, "v_proj": 1.5, "down_proj": 3.0},
    ),
    "llama, some layers, rank-stabilized": (
        "Llama",
        {},
        {"targets": "1.(self_attn.(k|o)|mlp.up)_proj", "use_rslora": True, "layers_to_transform": [1]},
        6 / math.sqrt(4),
    ),
    "qwen2": (
        "Qwen2",
        {},
        {
            "target_modules": ["q_proj", "self_attn.k_proj", "v_proj", "o_proj", "up_proj", "query"],
            "targets": "(q|k|v|o|up)_proj",
        },
        1.5,
    ),
    "phi3": ("Phi3", {"pad_token_id": None}, {"target_modules": "all-linear"}, 1.5),
    "gemma2": ("Gemma2", {"query_pre_attn_scalar": 9}, {}, 1.5),
    "qwen3 moe": (
        "Qwen3Moe",
        {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 19},
        {"targets": "self_attn.(q|o)_proj"},
        1.5,
    ),
}  # family, changes, adapter, its scale
PROMPTS = [prompt(11), prompt(1, seed=1), prompt(23, seed=2)]
COUNT = 32


class Case(NamedTuple):
    """A model's folder, its adapter's, the folder of both merged, and what transformers makes of that."""

    model: Path
    adapter: Path
    merged: Path
    answers: list[Greedy]

    @property
    def files(self) -> ModelFiles:
        return open_model(self.model, adapter=self.adapter)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    root = tmp_path_factory.mktemp("adapters")
    found = {}
    for name, (family, changes, settings, scale) in CASES.items():
        model = save(root / name / "model", family=family, **changes)
        adapter = save_adapter(root / name / "adapter", model, **settings)
        both = merge(root / name / "merged", model, adapter, scale)
        found[name] = Case(model, adapter, both, expected(both, PROMPTS, COUNT))
    return found


def answers(files: ModelFiles, world_size: int, weights: Any = None, **options: Any) -> list[Greedy]:
    """What `world_size` ranks, as threads, answer together; every rank has found the same."""
    found = run_ranks(
        world_size, lambda comm: generate(load(files, comm, weights, **options), comm, PROMPTS, COUNT, chunk=9)
    )
    assert all([one.tokens for one in other] == [one.tokens for one in found[0]] for other in found)
    return found[0]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("name", CASES)
def test_the_same_text_as_merged(cases: dict[str, Case], name: str, world_size: int) -> None:
    assert_same(answers(cases[name].files, world_size), cases[name].answers)


@pytest.mark.parametrize("name", CASES)
def test_the_adapter_matters(cases: dict[str, Case], name: str) -> None:
    """Without it the same model says something else: the tests above can fail."""
    bare = answers(open_model(cases[name].model), 1)
    assert [one.tokens for one in bare] != [one.tokens for one in cases[name].answers]


def test_a_rank_without_a_share(cases: dict[str, Case]) -> None:
    assert_same(answers(cases["llama"].files, 3, weights=(1.0, 0.0, 2.0)), cases["llama"].answers)


def test_over_a_gguf_file(cases: dict[str, Case], tmp_path: Path) -> None:
    """Whose rows of queries and keys lie in another order."""
    gguf = write_model(cases["llama"].model, tmp_path / "model.gguf", default="F32")
    assert_same(answers(open_model(gguf, adapter=cases["llama"].adapter), 2), cases["llama"].answers)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("bits", [8, 4])
def test_over_packed_weights(cases: dict[str, Case], bits: int, world_size: int) -> None:
    """The base is packed as without an adapter, which stays in floats: the logits of both differ by what packing
    costs, and by less than what the adapter adds."""
    case = cases["phi3"]

    def rank(comm: Communicator) -> list[torch.Tensor]:
        return [
            generate(load(files, comm, bits=bits), comm, PROMPTS, 1)[2].logits
            for files in (case.files, open_model(case.model))
        ]

    ours, bare = run_ranks(world_size, rank)[0]
    theirs = case.answers[2].logits[:1]
    error, without = (ours - theirs).norm() / theirs.norm(), (bare - theirs).norm() / theirs.norm()
    assert error < {8: 0.04, 4: 0.4}[bits]
    assert without > 2 * error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits(cases: dict[str, Case], dtype: torch.dtype) -> None:
    ours, theirs = answers(cases["llama"].files, 2, dtype=dtype), cases["llama"].answers
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.logits[0], reference.logits[0], atol=0.2, rtol=0.1)


@pytest.mark.parametrize(("world_size", "split"), [(1, None), (3, (2.0, 1.0, 0.0)), (5, None)])
@pytest.mark.parametrize("name", ["llama with patterns", "phi3"])
@pytest.mark.parametrize(("dtype", "bits"), [("float32", None), ("bfloat16", None), ("float32", 4)])
def test_its_bytes_are_planned(
    cases: dict[str, Case], name: str, world_size: int, split: Any, dtype: str, bits: int | None
) -> None:
    files = cases[name].files
    plan = plan_shards(read_config(files.config), world_size, split)
    told = holdings(files, plan, ["cpu"] * world_size, dtype=dtype, bits=bits)
    kinds = {"device": torch.device("cpu"), "dtype": getattr(torch, dtype), "context": 70, "bits": bits}

    def rank(comm: Communicator) -> tuple[int, int]:
        model = load_model(files, plan, comm.rank, comm, **kinds)
        return model.nbytes, model.new_cache(1).nbytes

    assert [(one.weights, one.block) for one in told] == run_ranks(world_size, rank)


def test_packed_shards_are_kept_without_it(
    cases: dict[str, Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(LIMIT_VARIABLE, "1")
    case = cases["llama"]
    for files in (open_model(case.model), case.files):
        load(files, Alone(), bits=8)
        assert len(list(tmp_path.rglob("*.safetensors"))) == 1


def test_a_layer_that_a_family_does_not_adapt_is_refused(cases: dict[str, Case]) -> None:
    files = cases["llama"].files
    asked_for_nothing = ShardLoader(files.tensors, Alone(), torch.device("meta"), torch.float32, adapter=files.adapter)
    with pytest.raises(ModelError, match=r"adapters of 'model\.layers\.0\..*' are not supported"):
        asked_for_nothing.refuse_unused()

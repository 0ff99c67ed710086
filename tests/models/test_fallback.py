"""Families that only transformers knows, through its own code: the same tokens at any world size, or a refusal."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from ringlm.errors import ConfigError, ModelError
from ringlm.models.config import read_config
from ringlm.models.sizes import holdings
from ringlm.parallel.shard import plan_shards
from ringlm.weights import open_model
from tests.models.reference import Greedy, assert_same, expected, generate, load, prompt, ring_greedy, save
from tests.models.test_sizes import held, loaded
from tests.parallel.local import run_ranks

PLAIN: dict[str, Any] = {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
SCALES = {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "attention_multiplier": 0.3, "residual_multiplier": 0.7}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "scales of its own": ("Granite", SCALES),
    "attention beside the mlp": ("Cohere", {"seed": 1}),
    "windows in some layers": ("Cohere2", {"sliding_window": 7, "num_hidden_layers": 4}),
    "a plain mlp, biases and a window": ("Starcoder2", {"sliding_window": 7}),
    "gates and ups in one matrix": ("Glm4", {}),
    "norms on heads": ("Exaone4", {"sliding_window": 7}),
    "norms with offsets": ("Nemotron", {}),
    "a biased head": ("Phi", {"head_dim": 4}),
}
PROMPTS = [prompt(11), prompt(1, seed=1), prompt(43, seed=2)]
COUNT = 10


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[Greedy]]]:
    """Each model's folder and transformers' answers."""
    root, found = tmp_path_factory.mktemp("fallback"), {}
    for name, (family, changes) in MODELS.items():
        folder = save(root / family, family=family, **(PLAIN | changes))
        found[name] = folder, expected(folder, PROMPTS, COUNT)
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("name", MODELS)
def test_greedy_equals_transformers(models: dict[str, Any], name: str, world_size: int) -> None:
    folder, theirs = models[name]
    assert_same(ring_greedy(folder, world_size, PROMPTS, COUNT), theirs)


@pytest.mark.parametrize("name", MODELS)
def test_prefill_in_chunks_beside_others(models: dict[str, Any], name: str) -> None:
    folder, theirs = models[name]
    assert_same(ring_greedy(folder, 2, PROMPTS, COUNT, chunk=5, weights=[2, 1]), theirs)


@pytest.mark.parametrize("options", [{"bits": 8}, {"dtype": torch.bfloat16}], ids=["int8", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_packed_and_in_bfloat16_it_stays_close(models: dict[str, Any], name: str, options: dict[str, Any]) -> None:
    folder, theirs = models[name]
    files = open_model(folder)

    def last_logits(comm: Any) -> torch.Tensor:
        found = generate(load(files, comm, **options), comm, [[*tokens, *lead] for tokens, lead in leads], 1)
        return torch.cat([greedy.logits for greedy in found])

    leads = [(tokens, greedy.tokens[:1]) for tokens, greedy in zip(PROMPTS, theirs, strict=True)]
    reference = torch.stack([greedy.logits[1] for greedy in theirs])
    for ours in run_ranks(2, last_logits):
        assert torch.cosine_similarity(ours, reference).min() > 0.99


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("name", MODELS)
def test_the_plan_says_what_is_loaded(models: dict[str, Any], name: str, bits: int | None) -> None:
    files = open_model(models[name][0])
    plan = plan_shards(read_config(files.config), 2)
    found = holdings(files, plan, ["cpu"] * 2, dtype="float32", bits=bits)
    assert held(found) == loaded(files, 2, None, "float32", bits)


def refusal(folder: Path, weights: list[float] | None = None) -> str:
    """The one line that says why the model in `folder` is not loaded."""
    files = open_model(folder)
    with pytest.raises((ModelError, ConfigError)) as caught:
        run_ranks(1 if weights is None else len(weights), lambda comm: load(files, comm, weights))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("StableLm", {}, "StableLmForCausalLM: transformers has no tensor-parallel plan for it"),
        ("Ernie4_5_Moe", {"moe_num_experts": 4, "moe_k": 2}, r"layer 'model\.layers\.1\.mlp\..*' has no place in"),
        ("Olmo3", {}, r"layer 'model\.layers\.0\.self_attn\.q_proj' is divided in a way \(colwise_gather_output\)"),
        ("Cohere", {"use_qk_norm": True}, r"layer 'model\.layers\.0\.self_attn\.q_norm' has no place in"),
        ("Mamba", {}, r"missing required field `intermediate_size`|no tensor-parallel plan"),
    ],
)
def test_layers_in_the_way_are_named(tmp_path: Path, family: str, changes: dict[str, Any], message: str) -> None:
    assert re.search(message, refusal(save(tmp_path, family=family, **(PLAIN | changes))))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["NewForCausalLM"], "model_type": "new"},
            "of model_type 'new' is not known",
        ),
        ({"architectures": ["NewForCausalLM"], "auto_map": {}}, "brings along is never run"),
        ({"model_type": ["granite"]}, "is not known"),
        ({"intermediate_size": None}, "GraniteForCausalLM is not a family known here: Expected `int`, got `null`"),
        ({"layer_norm_eps": 1, "hidden_act": "nothing"}, "transformers makes no GraniteForCausalLM of it"),
        ({"num_key_value_heads": 9}, r"k_proj.weight' has the shape \[12, 36\]; config.json makes it \[36, 36\]"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope type 'dynamic' is not supported in this family",
        ),
    ],
)
def test_mistakes_in_the_configuration(
    models: dict[str, Any], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = models["scales of its own"][0]
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    words = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(words | changes))
    assert re.search(message, refusal(tmp_path))


def test_code_of_the_folder_is_never_run(models: dict[str, Any], tmp_path: Path) -> None:
    folder, theirs = models["scales of its own"]
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (tmp_path / "modeling_new.py").write_text("raise SystemExit")
    words = json.loads((folder / "config.json").read_text())
    places = {"AutoConfig": "modeling_new.NewConfig", "AutoModelForCausalLM": "modeling_new.NewForCausalLM"}
    implementations = {"_attn_implementation": "modeling_new", "attn_implementation": "modeling_new"}
    (tmp_path / "config.json").write_text(json.dumps(words | implementations | {"auto_map": places}))
    assert_same(ring_greedy(tmp_path, 1, PROMPTS, COUNT), theirs)


def test_every_rank_needs_heads(models: dict[str, Any]) -> None:
    assert "rank 1 has no heads" in refusal(models["scales of its own"][0], [1, 0])

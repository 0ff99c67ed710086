"""Adapters that are damaged, do more than a sum of two products, or are another model's: each refused in one line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ringlm.errors import ConfigError, ModelError
from ringlm.ring.handshake import differing
from ringlm.weights import open_model
from tests.models.reference import save
from tests.weights.write_adapter import save_adapter

PREFIX = "base_model.model.model.layers.0."


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def adapter(model: Path, tmp_path: Path) -> Path:
    return save_adapter(tmp_path / "style", model, targets="q_proj|down_proj")


def refused(model: Path, adapter: Path) -> str:
    with pytest.raises(ModelError) as raised:
        open_model(model, adapter=adapter)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def change(adapter: Path, **settings: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def rewrite(adapter: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")


def test_what_is_whole_opens(model: Path, adapter: Path) -> None:
    found = open_model(model, adapter=adapter).adapter
    assert found is not None
    assert len(found.layers) == 4
    assert found.layers["model.layers.1.mlp.down_proj"][2:] == (4, 1.5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"peft_type": "LOHA"}, "adapters of the kind 'LOHA' are not supported; LORA is. Merge it"),
        ({"use_dora": True}, "use_dora True is not supported. Merge it into the model"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out True is not supported"),
        ({"bias": "lora_only"}, "bias lora_only is not supported"),
        ({"lora_bias": True}, "lora_bias True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save ['lm_head'] is not supported"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication [[0, 2], [1, 2]]"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices [3]"),
        ({"target_parameters": ["experts.down_proj"]}, "target_parameters ['experts.down_proj']"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights pissa_niter_4 is not supported"),
        ({"r": 0}, "Expected `int` >= 1 - at `$.r`"),
        ({"r": None}, "at `$.r`"),
        ({"rank_pattern": {"q_proj": "many"}}, "at `$.rank_pattern[...]`"),
        ({"alpha_pattern": {"(": 3}}, "rank_pattern and alpha_pattern: "),
        ({"rank_pattern": {"(.*)*x": 3}}, "'(.*)*x' repeats; name the layers."),
    ],
)
def test_settings(model: Path, adapter: Path, settings: dict[str, Any], words: str) -> None:
    change(adapter, **settings)
    said = refused(model, adapter)
    assert said.startswith("adapter_config.json: ")
    assert words in said


def test_settings_that_change_nothing_here(model: Path, adapter: Path) -> None:
    change(adapter, init_lora_weights="gaussian", modules_to_save=None, bias="none", lora_dropout=0.1, use_dora=False)
    change(adapter, target_modules=["q_proj", "mlp.down_proj", "query_key_value"], inference_mode=True, bias="none")
    assert open_model(model, adapter=adapter).adapter is not None


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda t: t.pop(PREFIX + "self_attn.q_proj.lora_B.weight"), "q_proj.lora_B.weight' is missing"),
        (lambda t: t.pop(PREFIX + "self_attn.q_proj.lora_A.weight"), "q_proj.lora_A.weight' is missing"),
        (
            lambda t: t.update({PREFIX + "self_attn.q_proj.lora_A.weight": torch.ones(3, 36)}),
            "q_proj.lora_A.weight' has the shape [3, 36]; adapter_config.json and the model make it [4, 36]. It was "
            "made for 'owner/base'.",
        ),
        (
            lambda t: t.update({PREFIX + "self_attn.q_proj.lora_B.weight": torch.ones(40, 4)}),
            "q_proj.lora_B.weight' has the shape [40, 4]; adapter_config.json and the model make it [36, 4].",
        ),
        (
            lambda t: t.update({PREFIX + "self_attn.q_proj.lora_magnitude_vector": torch.ones(36)}),
            "q_proj.lora_magnitude_vector' of type F32 is no part of a plain LoRA adapter",
        ),
        (
            lambda t: t.update({PREFIX + "self_attn.q_proj.lora_A.weight": torch.ones(4, 36, dtype=torch.int32)}),
            "q_proj.lora_A.weight' of type I32",
        ),
        (
            lambda t: t.update({"base_model.model.lm_head.lora_A.weight": torch.ones(4, 36)}),
            "adapts 'lm_head'; attention's and the MLP's projections can be adapted, no experts",
        ),
        (
            lambda t: t.update({PREFIX + "mlp.experts.3.up_proj.lora_A.weight": torch.ones(4, 36)}),
            "adapts 'model.layers.0.mlp.experts.3.up_proj'; attention's",
        ),
        (
            lambda t: t.update({"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.ones(4, 36)}),
            "adapts 'model.layers.9.mlp.up_proj', which the model does not have. It was made for 'owner/base'.",
        ),
        (lambda t: t.clear(), "holds no tensors"),
    ],
)
def test_tensors(model: Path, adapter: Path, edit: Callable[[dict[str, torch.Tensor]], object], words: str) -> None:
    rewrite(adapter, edit)
    said = refused(model, adapter)
    assert said.startswith(("adapter_model.safetensors: ", "style: tensor"))
    assert words in said


def test_a_layer_that_is_not_targeted(model: Path, adapter: Path) -> None:
    change(adapter, target_modules=["j_proj", "down_proj"])
    assert "adapts 'model.layers.0.self_attn.q_proj', which target_modules in adapter_config" in refused(model, adapter)


def test_files(model: Path, adapter: Path, tmp_path: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    assert "the file at" in refused(model, adapter)
    weights.unlink()
    weights.symlink_to(shutil.copy(model / "model.safetensors", tmp_path / "outside"))
    assert "is a symbolic link" in refused(model, adapter)
    weights.unlink()
    assert refused(model, adapter).startswith("adapter_model.safetensors: is missing in ")
    (adapter / "adapter_config.json").write_text("[")
    assert refused(model, adapter).startswith("adapter_config.json: is not a JSON object")
    (adapter / "adapter_config.json").unlink()
    assert refused(model, adapter).startswith("adapter_config.json: cannot be read")
    with pytest.raises(ConfigError, match=r"--adapter no/such: no such folder"):
        open_model(model, adapter="no/such")


def test_the_way_out_of_a_pickle(model: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line that is offered is one that works."""
    before = open_model(model, adapter=adapter).adapter
    weights = adapter / "adapter_model.safetensors"
    torch.save(load_file(weights), adapter / "adapter_model.bin")
    weights.unlink()
    said = refused(model, adapter)
    assert said.startswith("adapter_model.bin: is a pickle")
    monkeypatch.chdir(adapter)
    program = said.partition(' -c "')[2].removesuffix('"')
    subprocess.run([sys.executable, "-c", program], check=True, timeout=90)
    after = open_model(model, adapter=adapter).adapter
    assert before is not None
    assert after is not None
    assert after.fingerprint == before.fingerprint


def test_ranks_compare_their_adapters(model: Path, adapter: Path, tmp_path: Path) -> None:
    def identity(adapter: Path | None) -> str:
        return open_model(model, adapter=adapter).identity

    mine = identity(adapter)
    assert mine.startswith("tiny with the adapter style:")
    renamed = shutil.copytree(adapter, tmp_path / "renamed")
    change(renamed, base_model_name_or_path="elsewhere", inference_mode=False)
    assert differing(mine, identity(renamed)) == []
    change(renamed, lora_alpha=8)
    assert differing(mine, identity(renamed)) == ["adapter's configuration"]
    other = save_adapter(tmp_path / "other" / "style", model, targets="q_proj|down_proj", seed=1)
    assert differing(mine, identity(other)) == ["adapter's weights"]
    assert set(differing(mine, identity(None))) == {
        f"adapter's {one}" for one in ("configuration", "shapes", "weights")
    }

"""Seeded LoRA adapters as PEFT saves them, and models into which they are merged."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ringlm.weights import open_model

ALL = r"self_attn\.(q|k|v|o|qkv)_proj|mlp\.(gate|up|down|gate_up)_proj"


def save_adapter(
    folder: Path, model: Path, targets: str = ALL, seed: int = 0, ranks: dict[str, int] | None = None, **settings: Any
) -> Path:
    """An adapter for the layers of `model` in whose names `targets` is found: of rank r, or of what `ranks` has for
    the last word of a name."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "base_model_name_or_path": "owner/base"} | settings
    if ranks:
        config["rank_pattern"] = ranks
    (folder / "adapter_config.json").write_text(json.dumps(config))
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    source = open_model(model).tensors
    for name in sorted(source.names()):
        layer = name.removesuffix(".weight")
        if name != layer and re.search(targets, layer):
            whole = source.shape(name)
            rank = (ranks or {}).get(layer.rpartition(".")[2], config["r"])
            for half, shape in (("A", (rank, whole[1])), ("B", (whole[0], rank))):
                tensors[f"base_model.model.{layer}.lora_{half}.weight"] = torch.randn(shape, generator=random) * 0.2
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def merge(folder: Path, model: Path, adapter: Path, scale: dict[str, float] | float) -> Path:
    """`model` with scale * B A added to its weights, in float32; `scale` may be by the last word of a name."""
    shutil.copytree(model, folder)
    weights, added = load_file(model / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    for name in added:
        layer, half, _ = name.removeprefix("base_model.model.").rsplit(".", 2)
        if half == "lora_A":
            factor = scale if isinstance(scale, float) else scale[layer.rpartition(".")[2]]
            weights[f"{layer}.weight"] += factor * added[name.replace("lora_A", "lora_B")] @ added[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder

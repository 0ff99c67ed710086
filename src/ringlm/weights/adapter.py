"""LoRA adapters (arXiv:2106.09685) in the folders that PEFT saves: settings, and for every adapted layer two thin
matrices. Knows the names of a model's tensors, not what is done with them. Torch-free until a tensor is read.

The tensors say which layers are adapted; of the settings only what a layer adds is taken. What more an adapter may
change of its model is refused: leaving it out would be silently wrong.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple, TypeVar

import msgspec

from ringlm.errors import ConfigError, ModelError
from ringlm.weights.folder import FLOATS, FolderWeights, read_json
from ringlm.weights.source import WeightSource, fingerprint

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
_PICKLE: Final = "adapter_model.bin"
_TENSOR: Final = re.compile(r"base_model\.model\.(.+)\.lora_[AB]\.weight")
_REPEATS: Final = frozenset("*+?{")
_ADAPTABLE: Final = re.compile(r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj")
_REFUSED: Final = (  # settings that make more than a sum of two products, or change other parts of the model
    "alora_invocation_tokens",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
)
_HARMLESS_STARTS: Final = ("gaussian", "eva", "orthogonal")  # others have changed the model's own weights as well
_MERGE: Final = "Merge it into the model (PEFT's merge_and_unload), and give that with -m."
_T = TypeVar("_T")

Rank = Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]


class LowRank(NamedTuple):
    """What a layer's product gets added: scale * B(A x)."""

    down: str  # the tensor A (rank, in)
    up: str  # the tensor B (out, rank)
    rank: int
    scale: float


@dataclass(frozen=True)
class Adapter:
    """An opened adapter that fits its model: headers are checked, no weight has been read."""

    path: Path
    layers: Mapping[str, LowRank]  # by the names of the model's layers, without ".weight"
    tensors: FolderWeights
    fingerprint: str  # fields as of a model, without a name


class _Config(msgspec.Struct):
    """The settings that are used."""

    r: Rank
    lora_alpha: float
    peft_type: str = "LORA"
    use_rslora: bool = False
    bias: str = "none"
    init_lora_weights: bool | str | None = True
    target_modules: list[str] | str | None = None  # a text is a pattern, or "all-linear"
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, float] | None = None
    base_model_name_or_path: str | None = None


def open_adapter(path: Path, model: WeightSource) -> Adapter:
    """The adapter in the folder `path` for `model`.

    Raises ConfigError where there is none, ModelError where it is damaged, not understood, or another model's.
    """
    if not path.is_dir():
        raise ConfigError(f"--adapter {path}: no such folder. Give one with {CONFIG} and {WEIGHTS} in it.")
    config = _config(path)
    if not (path / WEIGHTS).exists():
        raise _no_weights(path)
    tensors = FolderWeights(path, WEIGHTS)
    names = frozenset(model.names())
    layers: dict[str, LowRank] = {}
    for name, entry in tensors.entries.items():
        found = _TENSOR.fullmatch(name)
        if found is None or entry.dtype not in FLOATS:
            raise ModelError(
                f"{tensors.place(name)} of type {entry.dtype} is no part of a plain LoRA adapter. {_MERGE}"
            )
        if found[1] not in layers:
            layers[found[1]] = _low_rank(found[1], config, tensors.place(name), f"{found[1]}.weight" in names)
    if not layers:
        raise ModelError(f"{WEIGHTS}: holds no tensors.")
    for layer, low in layers.items():
        whole = model.shape(f"{layer}.weight")  # (out, in)
        for name, shape in ((low.down, (low.rank, *whole[1:])), (low.up, (*whole[:1], low.rank))):
            if tensors.shape(name) != shape:
                raise ModelError(
                    f"{tensors.place(name)} has the shape {list(tensors.shape(name))}; {CONFIG} and the model make it "
                    f"{list(shape)}.{_made_for(config)}"
                )
    scales = {layer: low.scale for layer, low in layers.items()}
    return Adapter(path, layers, tensors, fingerprint(scales, tensors.entries))


def _config(folder: Path) -> _Config:
    raw = read_json(folder, CONFIG, dict[str, Any], "a JSON object")
    try:
        config = msgspec.convert(raw, _Config)
    except msgspec.ValidationError as error:
        raise ModelError(f"{CONFIG}: {error}.") from error
    if config.peft_type != "LORA":
        raise ModelError(
            f"{CONFIG}: adapters of the kind {config.peft_type!r:.40} are not supported; LORA is. {_MERGE}"
        )
    start = config.init_lora_weights
    said = {name: raw.get(name) for name in _REFUSED} | {
        "bias": config.bias != "none" and config.bias,
        "init_lora_weights": isinstance(start, str) and start.lower() not in _HARMLESS_STARTS and start,
    }
    for name, value in said.items():
        if value:
            raise ModelError(f"{CONFIG}: {name} {value!s:.40} is not supported. {_MERGE}")
    return config


def _low_rank(layer: str, config: _Config, place: str, exists: bool) -> LowRank:
    """What `layer` gets added, by the settings; `place` is one of its tensors."""
    if not _ADAPTABLE.fullmatch(layer):
        raise ModelError(
            f"{place} adapts {layer!r}; attention's and the MLP's projections can be adapted, no experts, routers, "
            f"embeddings or heads. {_MERGE}"
        )
    if not exists:
        raise ModelError(f"{place} adapts {layer!r}, which the model does not have.{_made_for(config)}")
    targets = config.target_modules
    if isinstance(targets, list) and not any(f".{layer}".endswith(f".{target}") for target in targets):
        raise ModelError(f"{place} adapts {layer!r}, which target_modules in {CONFIG} leave out. Download both again.")
    rank = _fitting(config.rank_pattern, layer, config.r)
    alpha = _fitting(config.alpha_pattern, layer, config.lora_alpha)
    scale = alpha / (math.sqrt(rank) if config.use_rslora else rank)
    prefix = f"base_model.model.{layer}.lora_"
    return LowRank(f"{prefix}A.weight", f"{prefix}B.weight", rank, scale)


def _fitting(patterns: Mapping[str, _T] | None, layer: str, default: _T) -> _T:
    """The value of the first pattern that the layer's name ends with, as PEFT has it. Those that repeat anything are
    refused: the file's author chooses them, and matching some takes for ever."""
    for key in patterns or ():
        if not _REPEATS.isdisjoint(key):
            raise ModelError(f"{CONFIG}: rank_pattern and alpha_pattern: {key!r} repeats; name the layers. {_MERGE}")
    try:
        found = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", layer))
        return next(found, default)
    except re.error as error:
        raise ModelError(f"{CONFIG}: rank_pattern and alpha_pattern: {error}.") from error


def _made_for(config: _Config) -> str:
    base = config.base_model_name_or_path
    return "" if base is None else f" It was made for {base!r}."


def _no_weights(folder: Path) -> ModelError:
    if not (folder / _PICKLE).exists():
        return ModelError(f"{WEIGHTS}: is missing in {folder}.")
    return ModelError(
        f"{_PICKLE}: is a pickle, and opening one may run any code in it. Convert it once, in its folder: python -c "
        f"\"import torch, safetensors.torch as s; s.save_file(torch.load('{_PICKLE}', weights_only=True), "
        f"'{WEIGHTS}')\""
    )

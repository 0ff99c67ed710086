"""A model on disk, whichever its format: where it is, its configuration, its tensors, and perhaps an adapter's.
Torch-free until one is read."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ringlm.errors import ConfigError
from ringlm.weights.adapter import Adapter, open_adapter
from ringlm.weights.folder import FolderWeights, read_json
from ringlm.weights.gguf import GGUFWeights
from ringlm.weights.gguf_header import GGUFHeader
from ringlm.weights.gguf_parts import gguf_name, models_in
from ringlm.weights.quantized import QuantizedFolder, interpreted
from ringlm.weights.source import WeightSource, fingerprint

log = logging.getLogger("ringlm")

Format = Literal["plain", "gguf"]


@dataclass(frozen=True)
class ModelFiles:
    """An opened model: headers are checked, no weight has been read."""

    path: Path
    format: Format
    name: str
    config: dict[str, Any]  # config.json's names, for GGUF as well
    fingerprint: str  # the name, a colon, and what is equal wherever the same model is held, under whichever name
    tensors: WeightSource
    changed: int  # when one of the weights' files was changed last, in nanoseconds; differs from machine to machine
    adapter: Adapter | None = None

    @property
    def adapter_name(self) -> str | None:
        """What the adapter is called, for people."""
        return None if self.adapter is None else model_name(self.adapter.path)

    @property
    def identity(self) -> str:
        """The fingerprint with the adapter's: equal on all ranks of a ring, but for the names."""
        if self.adapter is None:
            return self.fingerprint
        fields = (f"adapter's {field}" for field in self.adapter.fingerprint.split(","))
        _, _, own = self.fingerprint.rpartition(":")
        return f"{self.name} with the adapter {self.adapter_name}:{','.join((own, *fields))}"


def open_model(path: str | Path, format: str | None = None, adapter: str | Path | None = None) -> ModelFiles:
    """The model in a Hugging Face folder ("plain") or a GGUF file ("gguf"); `format` None: whichever is there.
    `adapter` is a folder with a LoRA adapter for it.

    Raises ConfigError for a path or format that does not fit, ModelError for files that are damaged or not understood.
    """
    path = Path(path).expanduser()
    if format not in (None, "plain", "gguf"):
        raise ConfigError(f"model format {format!r} is unknown; use plain or gguf.")
    path, found = _locate(path)
    if format not in (None, found):
        kind = "a GGUF file" if found == "gguf" else "a Hugging Face folder"
        raise ConfigError(f"{path} is {kind}, not {format}. Use {found}, or leave the format out.")
    source: FolderWeights | QuantizedFolder | GGUFWeights
    if found == "gguf":
        source = GGUFWeights(GGUFHeader(path))
        config, name = source.config, model_name(path)
    else:
        raw, config, name = FolderWeights(path), _config(path), model_name(path)
        source = interpreted(raw, config)
    changed = max(entry.stat().st_mtime_ns for entry in {entry.path for entry in source.entries.values()})
    return ModelFiles(
        path=path,
        format=found,
        name=name,
        config=config,
        fingerprint=f"{name}:{fingerprint(config, source.entries)}",
        tensors=source,
        changed=changed,
        adapter=None if adapter is None else open_adapter(Path(adapter).expanduser(), source),
    )


def model_name(path: Path) -> str:
    """What a model's folder or GGUF file is called: for people, and in answers. In Hugging Face's cache
    (models--owner--name/snapshots/commit) a folder's own name says nothing."""
    if path.suffix == ".gguf":
        return gguf_name(path)
    path = path.absolute()
    if path.parent.name == "snapshots":
        return path.parent.parent.name.removeprefix("models--").replace("--", "/")
    return path.resolve().name


def _locate(path: Path) -> tuple[Path, Format]:
    """The folder or file that is meant, and its format; a folder with a single GGUF model means that."""
    if not path.exists():
        raise ConfigError(f"{path}: no such file or folder. Give a Hugging Face folder or a GGUF file.")
    if path.is_file():
        if path.suffix == ".safetensors":
            raise ConfigError(f"{path}: give the folder it is in ({path.parent}), with config.json beside it.")
        return path, "gguf"
    ggufs = models_in(path)
    if not ggufs or (path / "config.json").exists():
        return path, "plain"
    if len(ggufs) > 1:
        raise ConfigError(f"{path}: holds {len(ggufs)} GGUF models. Give one of them, such as {ggufs[0]}.")
    return ggufs[0], "gguf"


def _config(folder: Path) -> dict[str, Any]:
    """config.json, with the tokens that end an answer from generation_config.json where that names them."""
    config = read_json(folder, "config.json", dict[str, Any], "a JSON object")
    if "auto_map" in config:
        log.info("%s names code in its folder (auto_map); it is not run, the model is the one of its name here", folder)
    if (folder / "generation_config.json").exists():
        ends = read_json(folder, "generation_config.json", dict[str, Any], "a JSON object").get("eos_token_id")
        if ends is not None:
            config["eos_token_id"] = ends
    return config

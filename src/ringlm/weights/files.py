"""A model on disk, whichever its format: where it is, its configuration, its tensors, and perhaps an adapter's.
Torch-free until one is read."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ringlm.errors import ModelError
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


def open_model(path: str | Path, adapter: str | Path | None = None) -> ModelFiles:
    """The model in a Hugging Face folder or a GGUF file; `adapter` is a folder with a LoRA adapter for it.

    Raises ModelError for files that are missing, damaged or not understood, ConfigError where there is no adapter.
    """
    path, format = locate(Path(path).expanduser())
    source: FolderWeights | QuantizedFolder | GGUFWeights
    name = model_name(path)
    if format == "gguf":
        source = GGUFWeights(GGUFHeader(path))
        config = source.config
    else:
        raw, config = FolderWeights(path), _config(path)
        source = interpreted(raw, config)
    changed = max(entry.stat().st_mtime_ns for entry in {entry.path for entry in source.entries.values()})
    return ModelFiles(
        path=path,
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


def locate(path: Path) -> tuple[Path, Format]:
    """The folder or file that is meant, and its format; a folder with a single GGUF model means that. Raises
    ModelError."""
    if not path.exists():
        raise ModelError(f"{path}: no such file or folder; give a Hugging Face folder or a GGUF file.")
    if path.is_file():
        with path.open("rb") as file:
            if file.read(4) == b"GGUF":
                return path, "gguf"
        hint = "give the folder that holds it" if path.suffix in (".safetensors", ".json") else "download it again"
        raise ModelError(f"{path.name}: is not a GGUF file; {hint}.")
    if os.path.lexists(path / "config.json"):  # a broken link is named by who reads it
        return path, "plain"
    files = models_in(path)
    if len(files) == 1:
        return files[0], "gguf"
    if files:
        raise ModelError(f"{path} holds {len(files)} GGUF models; give one of them, such as {files[0]}.")
    raise ModelError(f"{path} has no config.json and no GGUF file; is it the folder of a model?")


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

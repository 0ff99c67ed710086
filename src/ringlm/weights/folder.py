"""Hugging Face folders: config.json and safetensors files, one or many with an index. Knows no model.

Headers are parsed and checked here, without torch, before anything is read; tensors come through
`safetensors.safe_open`, which maps the file. Format: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from ringlm.errors import ModelError
from ringlm.weights.source import Entry, bounds

if TYPE_CHECKING:
    import torch

SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
_MAX_HEADER: Final = 100_000_000  # bytes; the limit of the safetensors library
_ITEM_BYTES: Final = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


class _Tensor(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


class FolderWeights:
    """The `WeightSource` over a folder's safetensors files."""

    def __init__(self, folder: Path) -> None:
        self._label = folder.name
        self.entries: Mapping[str, Entry] = _entries(folder)
        self._open: dict[Path, Any] = {}  # safe_open handles: the mapped files

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries.values())

    def names(self) -> tuple[str, ...]:
        return tuple(self.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def place(self, name: str) -> str:
        return f"{self._entry(name).path.name}: tensor {name!r}"

    def read(
        self,
        name: str,
        rows: slice | None = None,
        columns: slice | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        import torch
        from safetensors import SafetensorError, safe_open

        entry = self._entry(name)
        cuts = [slice(*bounds(rows, entry.shape[0]))]
        if columns is not None:
            cuts.append(slice(*bounds(columns, entry.shape[1])))
        try:
            if entry.path not in self._open:
                self._open[entry.path] = safe_open(entry.path, "pt")
            mapped: torch.Tensor = self._open[entry.path].get_slice(name)[tuple(cuts)]
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{self.place(name)} cannot be read: {error}.") from error
        return torch.empty(mapped.shape, dtype=dtype or mapped.dtype).copy_(mapped)  # ours, no longer the file's

    def packed(self, name: str, rows: slice, blocks: slice) -> None:
        self._entry(name)

    def form(self, name: str) -> None:
        self._entry(name)

    def _entry(self, name: str) -> Entry:
        if name not in self.entries:
            raise ModelError(f"{self._label}: tensor {name!r} is missing.")
        return self.entries[name]


def read_small(path: Path, limit: int = 64_000_000) -> bytes:
    """The bytes of a small text file; ModelError where it is missing or larger than `limit` bytes."""
    try:
        size = path.stat().st_size
        if size > limit:
            raise ModelError(f"{path.name}: {size:,} bytes are too many for this file; the limit is {limit:,}.")
        return path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path.name}: cannot be read: {error}.") from error


def _entries(folder: Path) -> dict[str, Entry]:
    """Every tensor of the folder, checked against its file's size."""
    if not (folder / INDEX).exists():
        if not (folder / SINGLE).exists():
            raise _no_weights(folder)
        return _header(folder / SINGLE)
    try:
        weight_map = msgspec.json.decode(read_small(folder / INDEX), type=_Index).weight_map
    except msgspec.MsgspecError as error:
        raise ModelError(f"{INDEX}: is not an index of tensors: {error}. Download it again.") from error
    headers: dict[str, dict[str, Entry]] = {}
    for file in sorted(set(weight_map.values())):
        if file != Path(file).name or file in ("", ".", ".."):
            raise ModelError(f"{INDEX}: names {file!r}, which is not a file of this folder.")
        if not (folder / file).exists():
            missing = next(name for name, where in weight_map.items() if where == file)
            raise ModelError(f"{file}: is missing, and {INDEX} has tensor {missing!r} in it. Download it again.")
        headers[file] = _header(folder / file)
    for name, file in weight_map.items():
        if name not in headers[file]:
            raise ModelError(f"{file}: tensor {name!r} is missing, though {INDEX} has it there. Download both again.")
    return {name: headers[file][name] for name, file in weight_map.items()}


def _header(path: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            first = file.read(8)
            length = int.from_bytes(first, "little")
            if first == b"version ":
                raise ModelError(f"{path.name}: is a Git LFS pointer, not the file itself. Run `git lfs pull`.")
            if size < 8 or length > min(_MAX_HEADER, size - 8):
                raise ModelError(
                    f"{path.name}: its header ends at byte {length + 8:,}, the file at {size:,}. Download it again."
                )
            text = file.read(length)
    except OSError as error:
        raise ModelError(f"{path.name}: cannot be read: {error}.") from error
    try:
        raw = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        raw.pop("__metadata__", None)
        tensors = {name: msgspec.json.decode(value, type=_Tensor) for name, value in raw.items()}
    except msgspec.MsgspecError as error:
        raise ModelError(f"{path.name}: its header is damaged: {error}. Download it again.") from error
    return {
        name: _entry(path, name, tensor, base=8 + length, file_size=size)
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1].data_offsets)
    }


def _entry(path: Path, name: str, tensor: _Tensor, base: int, file_size: int) -> Entry:
    where = f"{path.name}: tensor {name!r}"
    start, end = tensor.data_offsets
    if tensor.dtype not in _ITEM_BYTES:
        raise ModelError(f"{where} is of type {tensor.dtype}; supported are {', '.join(_ITEM_BYTES)}.")
    nbytes = math.prod(tensor.shape) * _ITEM_BYTES[tensor.dtype]
    if not tensor.shape or min(tensor.shape) < 1 or start < 0 or end - start != nbytes:
        raise ModelError(
            f"{where} has the shape {tensor.shape} of {nbytes:,} bytes in {end - start:,}. Download it again."
        )
    if base + end > file_size:
        raise ModelError(f"{where} ends at byte {base + end:,}, the file at {file_size:,}. Download it again.")
    return Entry(path, tensor.dtype, tuple(tensor.shape), base + start, nbytes)


def _no_weights(folder: Path) -> ModelError:
    pickled = sorted(path.name for suffix in ("*.bin", "*.pt", "*.pth") for path in folder.glob(suffix))
    if not pickled:
        return ModelError(f"{folder.name}: holds neither {SINGLE} nor {INDEX}.")
    return ModelError(
        f"{folder.name}: holds its weights only as pickles ({pickled[0]}), and opening a pickle may run any code in "
        'it. Where you trust it, convert it once: python -c "from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained('{folder.name}').save_pretrained('{folder.name}-safetensors')\""
    )

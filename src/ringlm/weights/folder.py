"""Hugging Face folders: config.json and safetensors files, one or many with an index. Knows no model, and nothing of
quantization: a tensor of codes is read as such.

Headers are parsed and checked here, without torch, before anything is read; tensors are copied out of mapped files,
whose pages are let go at once, so that a rank holds its share and no more. Format: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import math
import mmap
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec

from ringlm.errors import ModelError
from ringlm.weights.source import Cut, Entry, Form, Tensors, bounds, release

if TYPE_CHECKING:
    import torch

    from ringlm.weights.packed import Packed

SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
_MAX_JSON: Final = 64_000_000  # bytes
_MAX_HEADER: Final = 100_000_000  # bytes; the limit of the safetensors library
_TORCH_NAMES: Final = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "I32": "int32",
    "U32": "uint32",
}
FLOATS: Final = ("F64", "F32", "F16", "BF16")
_ITEM_BYTES: Final = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I32": 4, "U32": 4}
_NOT_JSON: Final = (msgspec.MsgspecError, RecursionError, UnicodeDecodeError)  # what decoding raises
_T = TypeVar("_T")


class _Tensor(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


class FolderWeights(Tensors):
    """The `WeightSource` over a folder's safetensors files: its model's, or just `file`."""

    def __init__(self, folder: Path, file: str | None = None) -> None:
        super().__init__(folder.name, _entries(folder) if file is None else _header(file_in(folder, file)))
        self._mapped: dict[Path, mmap.mmap] = {}

    def read(self, name: str, rows: Cut = None, columns: Cut = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        import torch

        entry = self.entry(name)
        parts = () if rows is columns is None else (rows,) if columns is None else (rows, columns)
        cuts = [slice(*bounds(part, size)) for part, size in zip(parts, entry.shape, strict=False)]
        stored: torch.dtype = getattr(torch, _TORCH_NAMES[entry.dtype])
        whole = torch.frombuffer(self._map(entry), dtype=stored, count=math.prod(entry.shape), offset=entry.offset)
        mapped = whole.view(entry.shape)[tuple(cuts)]
        found = torch.empty(mapped.shape, dtype=dtype or stored).copy_(mapped)  # ours, no longer the file's
        first, last = (cuts[0].start, cuts[0].stop) if cuts else (0, 1)
        size = entry.nbytes // (entry.shape[0] if cuts else 1)
        release(self._map(entry), entry.offset + first * size, entry.offset + last * size)
        return found

    def packed(self, name: str, rows: slice, blocks: slice) -> Packed | None:
        self.entry(name)
        return None

    def form(self, name: str) -> Form | None:
        self.entry(name)
        return None

    def _map(self, entry: Entry) -> mmap.mmap:
        if entry.path not in self._mapped:
            try:
                with open(entry.path, "rb") as file:
                    # Writable copies of pages, which nobody makes: torch warns of memory that it could not write to.
                    self._mapped[entry.path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            except OSError as error:
                raise ModelError(f"{entry.path.name}: cannot be read: {error}.") from error
        return self._mapped[entry.path]


def file_in(folder: Path, name: str) -> Path:
    """The file `name` of the folder; ModelError where it is none, or a symbolic link to a place outside.

    The folders of Hugging Face's cache link to files beside them, within the folder of the same model.
    """
    path, home = folder / name, folder.resolve()
    if home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--"):
        home = home.parent.parent
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise ModelError(f"{name}: cannot be read: {error}.") from error
    if not target.is_relative_to(home):
        raise ModelError(f"{name}: is a symbolic link to {target}, outside the model's folder. Copy the file there.")
    if not target.is_file():
        raise ModelError(f"{name}: is not a file.")
    return path


def read_json(folder: Path, name: str, form: type[_T], what: str) -> _T:
    """A small file of the folder that holds JSON of the type `form`, called `what`; ModelError where it is missing,
    damaged or larger than 64 MB."""
    path = file_in(folder, name)
    try:
        size = path.stat().st_size
        if size > _MAX_JSON:
            raise ModelError(f"{name}: {size:,} bytes are too many for this file; the limit is {_MAX_JSON:,}.")
        return msgspec.json.decode(path.read_bytes(), type=form)
    except OSError as error:
        raise ModelError(f"{name}: cannot be read: {error}.") from error
    except _NOT_JSON as error:
        raise ModelError(f"{name}: is not {what}: {error}. Download it again.") from error


def _entries(folder: Path) -> dict[str, Entry]:
    """Every tensor of the folder, checked against its file's size."""
    if not (folder / INDEX).exists():
        if not (folder / SINGLE).exists():
            raise _no_weights(folder)
        return _header(file_in(folder, SINGLE))
    weight_map = read_json(folder, INDEX, _Index, "an index of tensors").weight_map
    headers: dict[str, dict[str, Entry]] = {}
    for file in sorted(set(weight_map.values())):
        if file != Path(file).name or file in ("", ".", ".."):
            raise ModelError(f"{INDEX}: names {file!r}, which is not a file of this folder.")
        if not os.path.exists(folder / file):  # Path.exists raises for a name that is too long
            missing = next(name for name, where in weight_map.items() if where == file)
            raise ModelError(f"{file}: is missing, and {INDEX} has tensor {missing!r} in it. Download it again.")
        headers[file] = _header(file_in(folder, file))
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
    except _NOT_JSON as error:
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
    if min(tensor.shape, default=1) < 1 or start < 0 or end - start != nbytes:
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

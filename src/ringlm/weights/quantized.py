"""Folders whose matrices are quantized: the `WeightSource` over the matrices that several tensors of a folder make up.
Knows what a method's name in config.json stands for; how its tensors are read is in fp8.py, mlx.py and gptq.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from ringlm.errors import ModelError
from ringlm.weights import fp8, gptq, mlx
from ringlm.weights.folder import FLOATS, FolderWeights
from ringlm.weights.matrix import Quantized, settings
from ringlm.weights.source import Cut, Form, bounds

if TYPE_CHECKING:
    import torch

    from ringlm.weights.packed import Packed

_TILE: Final = 1 << 20  # elements turned into float32 at a time


def interpreted(raw: FolderWeights, config: Mapping[str, Any]) -> FolderWeights | QuantizedFolder:
    """The tensors of the model in a folder, whose `config` may say that they are quantized; ModelError for a method, or
    for tensors, that are not understood."""
    found = _quantized(raw, config)
    for name, entry in raw.entries.items():
        if entry.dtype not in FLOATS and name not in found.used:
            raise ModelError(
                f"{raw.place(name)} is of type {entry.dtype}, and config.json does not say how it is quantized; "
                f"without that, supported are {', '.join(FLOATS)}."
            )
    return QuantizedFolder(raw, found) if found.matrices else raw


def _quantized(raw: FolderWeights, config: Mapping[str, Any]) -> Quantized:
    if "quantization" in config:  # mlx-lm's name; it repeats the same as quantization_config
        return mlx.find(raw, settings(config["quantization"], dict[str, Any]))
    if config.get("quantization_config") is None:
        return Quantized({}, ())
    described = settings(config["quantization_config"], dict[str, Any])
    method, form = described.get("quant_method"), described.get("format")
    if method in ("gptq", "awq"):
        return gptq.find(raw, described)
    if method in ("fp8", "fbgemm_fp8") or (method, form) == ("compressed-tensors", "float-quantized"):
        return fp8.find(raw, described)
    name = f"{method!r:.40}" + ("" if form is None else f" in the format {form!r:.40}")
    raise ModelError(
        f"config.json: weights quantized by {name} are not supported; gptq, awq, fp8, fbgemm_fp8, compressed-tensors "
        "in the format 'float-quantized', and MLX's are. Use the unquantized model with --quant int4, or a GGUF file."
    )


class QuantizedFolder:
    """The `WeightSource` over `raw`, some of whose tensors make up the matrices that were `found`."""

    def __init__(self, raw: FolderWeights, found: Quantized) -> None:
        self._raw, self._matrices = raw, found.matrices
        self._others = tuple(name for name in raw.names() if name not in found.used)
        self.entries, self.nbytes = raw.entries, raw.nbytes

    def names(self) -> tuple[str, ...]:
        return (*self._matrices, *self._others)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._matrices[name].shape if name in self._matrices else self._raw.shape(name)

    def place(self, name: str) -> str:
        return self._raw.place(self._matrices[name].tensor if name in self._matrices else name)

    def read(self, name: str, rows: Cut = None, columns: Cut = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        if name not in self._matrices:
            return self._raw.read(name, rows, columns, dtype)
        import torch

        matrix = self._matrices[name]
        (top, bottom), (left, right) = bounds(rows, matrix.shape[0]), bounds(columns, matrix.shape[1])
        out = torch.empty(bottom - top, right - left, dtype=dtype or torch.float32)
        if out.numel():
            height = max(1, _TILE // out.shape[1])
            for first in range(top, bottom, height):
                last = min(first + height, bottom)
                out[first - top : last - top] = matrix.floats(slice(first, last), slice(left, right))
        return out

    def packed(self, name: str, rows: slice, blocks: slice) -> Packed | None:
        if name not in self._matrices:
            return self._raw.packed(name, rows, blocks)
        from ringlm.weights.packed import BLOCK

        matrix = self._matrices[name]
        rows = slice(*bounds(rows, matrix.shape[0]))
        found = matrix.packed(rows, slice(*bounds(blocks, -(-matrix.shape[1] // BLOCK))))
        if found is not None and not all(part.isfinite().all() for part in found[2:] if part is not None):
            raise ModelError(f"{self.place(name)} has scales that are not finite in float16. Use --quant none.")
        return found

    def form(self, name: str) -> Form | None:
        return self._matrices[name].form if name in self._matrices else self._raw.form(name)

"""A quantized matrix, as every method gives it, and what methods check their settings and tensors with."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

import msgspec

from ringlm.errors import ModelError
from ringlm.weights.folder import FolderWeights
from ringlm.weights.source import Form

if TYPE_CHECKING:
    import torch

    from ringlm.weights.packed import Packed

_T = TypeVar("_T")


class Matrix(Protocol):
    """A matrix (out, in) that is quantized."""

    tensor: str  # the one that holds its codes, in the files
    shape: tuple[int, int]
    form: Form | None  # of what `packed` gives; None where no blocks of 32 hold its codes as they are

    def floats(self, rows: slice, columns: slice) -> torch.Tensor:
        """Its weights in float32."""
        ...

    def packed(self, rows: slice, blocks: slice) -> Packed | None:
        """As `WeightSource.packed`, whose scales and minimums may be infinite here."""
        ...


class Quantized(NamedTuple):
    """What a method makes of a folder."""

    matrices: Mapping[str, Matrix]  # by their Hugging Face names
    used: Collection[str]  # the tensors that are no tensors of the model, in or beside those matrices


def settings(described: object, form: type[_T]) -> _T:
    """A method's settings in config.json, checked."""
    try:
        return msgspec.convert(described, form)
    except msgspec.ValidationError as error:
        raise ModelError(f"config.json: quantization_config: {error}.") from error


def expect(raw: FolderWeights, name: str, dtypes: Collection[str], shape: tuple[int, ...]) -> None:
    """ModelError unless the folder has that tensor, in one of those types and in that shape."""
    found = raw.shape(name)
    if raw.entries[name].dtype not in dtypes or found != shape:
        raise ModelError(
            f"{raw.place(name)} is {raw.entries[name].dtype} {list(found)}; to fit config.json and the tensors beside "
            f"it, it would be {' or '.join(dtypes)} {list(shape)}."
        )

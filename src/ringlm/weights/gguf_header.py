"""The header of a GGUF model: metadata and where each tensor lies. Knows no torch and no model; reads no weights.

Its file, or files, are mapped, every count and length is held against its size before it is used, and arrays (a
vocabulary of 100,000 tokens) are walked once and decoded when asked for: the gguf package takes a file at its word, and
seconds for such arrays. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from ringlm.errors import ModelError
from ringlm.weights.gguf_parts import parts_of

# ggml type: (name, elements in a block, bytes of a block)
BLOCK_FORMATS: Final[Mapping[int, tuple[str, int, int]]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    20: ("IQ4_NL", 32, 18),
    30: ("BF16", 1, 2),
    39: ("MXFP4", 32, 17),
}

_OTHERS: Final = {  # names for a message
    9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M",
    34: "TQ1_0", 35: "TQ2_0", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip

_SCALARS: Final = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING: Final = 8
_ARRAY: Final = 9
_MAX_DIMENSIONS: Final = 4  # GGML_MAX_DIMS
_MAX_NAME: Final = 65_535  # bytes of a metadata key; tensor names are shorter


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies. `shape` is in torch's order (rows first), `offset` counts from the file's start."""

    path: Path
    name: str
    shape: tuple[int, ...]
    ggml_type: str
    offset: int
    nbytes: int


class GGUFHeader:
    """`metadata` and `tensors` of the GGUF file at `path`, or of all the files of which it is a part.

    `path` is the first file, which has the metadata, and `data` maps each file. Raises ModelError, with file and key
    or tensor, for anything that is not a whole, well-formed GGUF model of version 2 or 3, little-endian, in the types
    of `BLOCK_FORMATS`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path, *others = parts_of(Path(path))
        data, self.metadata, tensors = _read(self.path)
        count = self.metadata.get("split.count", 0) or 1
        if count != len(others) + 1:
            raise ModelError(
                f"{self.path.name}: is one of {count!r:.20} parts by its metadata and of {len(others) + 1} by its "
                "name. Parts are named NAME-00001-of-00003.gguf and so on: give them their names again, or merge them."
            )
        self.data: dict[Path, mmap.mmap] = {self.path: data}
        self.tensors: Mapping[str, TensorInfo] = tensors
        for number, other in enumerate(others, 1):
            self.data[other], metadata, more = _read(other)
            if metadata.get("split.no") != number or metadata.get("split.count") != count:
                raise ModelError(f"{other.name}: is not what its name says, part {number + 1}. Download it again.")
            for name in more.keys() & tensors.keys():
                raise ModelError(f"{other.name}: tensor {name!r} is in {tensors[name].path.name} as well.")
            tensors.update(more)
        total = self.metadata.get("split.tensors.count", len(tensors))
        if others and total != len(tensors):
            raise ModelError(f"{self.path.name}: its parts hold {len(tensors)} tensors of {total!r:.20}.")


def _read(path: Path) -> tuple[mmap.mmap, Metadata, dict[str, TensorInfo]]:
    """One file, mapped, and what its header says."""
    try:
        with open(path, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # an empty file cannot be mapped: ValueError
        raise ModelError(f"{path.name}: cannot be read: {error}.") from error
    cursor = _Cursor(data, path)
    tensor_count, field_count = cursor.preamble()
    metadata = Metadata(cursor, field_count)
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
        raise cursor.error(f"general.alignment is {alignment!r}; it must be a power of two from 8 up")
    return data, metadata, _tensors(cursor, tensor_count, alignment)


class Metadata(Mapping[str, Any]):
    """A file's metadata by key. Values are decoded anew each time they are asked for; arrays become lists."""

    def __init__(self, cursor: _Cursor, count: int) -> None:
        self._cursor = cursor
        self._places: dict[str, tuple[int, int]] = {}  # key: (value type, position)
        cursor.check_count(count, 13, "metadata keys")
        for _ in range(count):
            key = cursor.string("a metadata key", _MAX_NAME)
            if key in self._places:
                raise cursor.error(f"metadata key {key!r} comes twice")
            kind = cursor.integer("<I", f"the type of {key!r}")
            self._places[key] = (kind, cursor.position)
            cursor.skip(kind, key)

    def __getitem__(self, key: str) -> Any:
        kind, position = self._places[key]
        return self._cursor.at(position).value(kind, key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class _Cursor:
    """A position in the mapped file that refuses to read past its end."""

    def __init__(self, data: mmap.mmap, path: Path, position: int = 0) -> None:
        self.data, self.path, self.name, self.position = data, path, path.name, position

    def at(self, position: int) -> _Cursor:
        return _Cursor(self.data, self.path, position)

    def error(self, what: str) -> ModelError:
        return ModelError(f"{self.name}: {what}. The file is damaged: download it again.")

    def take(self, nbytes: int, what: str) -> int:
        """The position of the next `nbytes`, which lie in the file."""
        start = self.position
        if nbytes > len(self.data) - start:
            raise self.error(f"{what} ends at byte {start + nbytes:,}, the file at {len(self.data):,}")
        self.position = start + nbytes
        return start

    def check_count(self, count: int, least_bytes: int, what: str) -> None:
        if count * least_bytes > len(self.data) - self.position:
            raise self.error(f"{count:,} {what} do not fit in a file of {len(self.data):,} bytes")

    def preamble(self) -> tuple[int, int]:
        """Checks magic and version; the number of tensors and of metadata keys."""
        if self.data[:4] != b"GGUF":
            raise ModelError(f"{self.name}: this is not a GGUF file (it does not begin with 'GGUF').")
        self.position = 4
        version = self.integer("<I", "the version")
        if version not in (2, 3):
            order = " or big-endian" if version >> 16 else ""
            raise ModelError(
                f"{self.name}: GGUF version {version}{order} is not supported; convert the model again to version 3."
            )
        return self.integer("<Q", "the tensor count"), self.integer("<Q", "the key count")

    def integer(self, code: str, what: str) -> int:
        value: int = struct.unpack_from(code, self.data, self.take(struct.calcsize(code), what))[0]
        return value

    def string(self, what: str, limit: int | None = None) -> str:
        length = self.integer("<Q", f"the length of {what}")
        if limit is not None and length > limit:
            raise self.error(f"{what} is {length:,} bytes long, more than {limit:,}")
        start = self.take(length, what)
        try:
            return self.data[start : start + length].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is not UTF-8 text") from error

    def array(self, key: str) -> tuple[int, int]:
        """Element type and count of the array that begins here; its elements may still end past the file."""
        kind, count = self.integer("<I", f"the array {key!r}"), self.integer("<Q", f"the array {key!r}")
        if kind != _STRING and kind not in _SCALARS:
            raise self.error(f"the array {key!r} has elements of the unknown type {kind}")
        self.check_count(count, 8 if kind == _STRING else struct.calcsize(_SCALARS[kind]), f"elements of {key!r}")
        return kind, count

    def skip(self, kind: int, key: str) -> None:
        """Move past a value without decoding it."""
        if kind in _SCALARS:
            self.take(struct.calcsize(_SCALARS[kind]), repr(key))
        elif kind == _STRING:
            self.take(self.integer("<Q", repr(key)), repr(key))
        elif kind == _ARRAY:
            element, count = self.array(key)
            if element != _STRING:
                self.take(count * struct.calcsize(_SCALARS[element]), repr(key))
                return
            data, position, end, length_at = self.data, self.position, len(self.data), struct.Struct("<Q").unpack_from
            for _ in range(count):  # inlined: a vocabulary and its merges are hundreds of thousands of strings
                if position > end - 8:
                    raise self.error(f"the array {key!r} ends past the file's {end:,} bytes")
                position += 8 + length_at(data, position)[0]
            if position > end:
                raise self.error(f"the array {key!r} ends at byte {position:,}, the file at {end:,}")
            self.position = position
        else:
            raise self.error(f"{key!r} has the unknown type {kind}")

    def value(self, kind: int, key: str) -> Any:
        """Decode a value that `skip` has been over."""
        if kind == _STRING:
            return self.string(repr(key))
        if kind == _ARRAY:
            element, count = self.array(key)
            if element == _STRING:
                return [self.string(f"{key}[{index}]") for index in range(count)]
            code = f"<{count}{_SCALARS[element][1]}"
            return list(struct.unpack_from(code, self.data, self.take(struct.calcsize(code), repr(key))))
        return struct.unpack_from(_SCALARS[kind], self.data, self.position)[0]


def _tensors(cursor: _Cursor, count: int, alignment: int) -> dict[str, TensorInfo]:
    """The tensor table; offsets in the file count from its end, rounded up to `alignment`."""
    cursor.check_count(count, 24, "tensors")
    found: list[TensorInfo] = []
    for _ in range(count):
        name = cursor.string("a tensor's name", _MAX_NAME)
        rank = cursor.integer("<I", f"tensor {name!r}")
        if not 1 <= rank <= _MAX_DIMENSIONS:
            raise cursor.error(f"tensor {name!r} has {rank:,} dimensions")
        shape = tuple(cursor.integer("<Q", f"tensor {name!r}") for _ in range(rank))[::-1]  # ggml: fastest first
        kind = cursor.integer("<I", f"tensor {name!r}")
        offset = cursor.integer("<Q", f"tensor {name!r}")
        if kind not in BLOCK_FORMATS:
            known = _OTHERS.get(kind, f"{kind}, which is unknown")
            raise ModelError(
                f"{cursor.name}: tensor {name!r} is of type {known}; supported are "
                f"{', '.join(format_name for format_name, _, _ in BLOCK_FORMATS.values())}. "
                "Get the model in one of these, such as Q4_K_M."
            )
        format_name, block, block_bytes = BLOCK_FORMATS[kind]
        if 0 in shape or shape[-1] % block:
            raise cursor.error(f"tensor {name!r} has the shape {list(shape)}, not rows in blocks of {block}")
        if offset % alignment:
            raise cursor.error(f"tensor {name!r} begins at offset {offset:,}, not a multiple of {alignment}")
        found.append(TensorInfo(cursor.path, name, shape, format_name, offset, math.prod(shape) // block * block_bytes))
    base = -(-cursor.position // alignment) * alignment
    placed: dict[str, TensorInfo] = {}
    for info in found:
        end = base + info.offset + info.nbytes
        if end > len(cursor.data):
            raise ModelError(
                f"{cursor.name}: tensor {info.name!r} ends at byte {end:,}, the file at {len(cursor.data):,}. "
                "Download it again."
            )
        if info.name in placed:
            raise cursor.error(f"tensor {info.name!r} comes twice")
        placed[info.name] = dataclasses.replace(info, offset=base + info.offset)
    return placed

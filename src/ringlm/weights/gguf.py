"""Tensors of a GGUF model by Hugging Face names and in Hugging Face layout, dequantized by slice. Knows no model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from ringlm.errors import ModelError
from ringlm.weights.gguf_config import ROPE_FACTORS, config_from, hugging_face_name, is_permuted
from ringlm.weights.gguf_header import BLOCK_FORMATS, GGUFHeader, TensorInfo
from ringlm.weights.source import Cut, Entry, Form, Tensors, bounds, release

if TYPE_CHECKING:
    import torch

    from ringlm.weights.packed import Packed

_TILE: Final = 1 << 20  # elements turned into float32 at a time: 4 MB stay in the cache
_FORMATS: Final = {name: (block, nbytes) for name, block, nbytes in BLOCK_FORMATS.values()}
_FORMS: Final = {  # what weights/blocks.py makes of them
    "Q4_0": Form(4, minimums=False),
    "Q4_1": Form(4, minimums=True),
    "Q4_K": Form(4, minimums=True),
    "Q5_0": Form(8, minimums=False),
    "Q5_1": Form(8, minimums=True),
    "Q5_K": Form(8, minimums=True),
    "Q6_K": Form(8, minimums=False),
    "Q8_0": Form(8, minimums=False),
    "IQ4_NL": Form(8, minimums=False),
    "MXFP4": Form(8, minimums=False),
}


class GGUFWeights(Tensors):
    """The `WeightSource` over a GGUF model, in one file or several."""

    def __init__(self, header: GGUFHeader) -> None:
        self._data = header.data
        self._file = header.path.name
        self.config = config_from(header)
        self._arch: str = header.metadata["general.architecture"]
        entries: dict[str, Entry] = {}
        for info in header.tensors.values():
            name = hugging_face_name(info.name, self._arch)
            if name is not None:
                entries.update(self._parts(name, info))
            elif info.name not in ROPE_FACTORS:
                raise ModelError(f"{self._file}: tensor {info.name!r} is not a part of a {self._arch} model.")
        super().__init__(self._file, entries)

    def _parts(self, name: str, info: TensorInfo) -> Iterator[tuple[str, Entry]]:
        """The tensor, or each expert's part of it under a name of its own."""
        if "*" not in name:
            yield name, Entry(info.path, info.ggml_type, info.shape, info.offset, info.nbytes)
            return
        experts = self.config.get("num_local_experts")
        if len(info.shape) != 3 or info.shape[0] != experts:
            raise ModelError(
                f"{self._file}: tensor {info.name!r} has the shape {list(info.shape)}, not {experts} experts' matrices."
            )
        nbytes = info.nbytes // experts
        for expert in range(experts):
            entry = Entry(info.path, info.ggml_type, info.shape[1:], info.offset + expert * nbytes, nbytes)
            yield name.replace("*", str(expert)), entry

    def read(self, name: str, rows: Cut = None, columns: Cut = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        entry = self.entry(name)
        vector = len(entry.shape) == 1  # a single row, of which `rows` are the columns
        inner = (0, 1) if vector else bounds(columns, entry.shape[1])

        def part(start: int, stop: int) -> torch.Tensor:
            if vector:
                return self._tiles(entry, inner, (start, stop), dtype).view(-1)
            return self._tiles(entry, (start, stop), inner, dtype)

        return self._in_order(name, entry, *bounds(rows, entry.shape[0]), part)

    def packed(self, name: str, rows: slice, blocks: slice) -> Packed | None:
        from ringlm.weights.blocks import packed
        from ringlm.weights.packed import BLOCK, Packed

        entry = self.entry(name)
        block, block_bytes = _FORMATS[entry.dtype]
        if block == 1 or len(entry.shape) != 2:
            return None
        start, stop = bounds(rows, entry.shape[0])
        left, right = bounds(blocks, entry.shape[1] // BLOCK)
        parts = block // BLOCK  # of a block in the file; a cut may go through it
        first, last = left // parts, -(-right // parts)

        def raw(start: int, stop: int) -> torch.Tensor:
            tile = self._raw(entry, start, stop, first * block_bytes, last * block_bytes)
            return tile.view(stop - start, last - first, block_bytes)

        whole = packed(self._in_order(name, entry, start, stop, raw), entry.dtype)
        cut = slice(left - first * parts, right - first * parts)
        bits, codes, scales, minimums = whole
        found = Packed(bits, codes[:, cut], scales[:, cut], None if minimums is None else minimums[:, cut])
        if not all(tensor.isfinite().all() for tensor in found[2:] if tensor is not None):
            raise ModelError(f"{self.place(name)} holds scales that are not finite in float16. Download it again.")
        return found

    def form(self, name: str) -> Form | None:
        return _FORMS.get(self.entry(name).dtype)

    def _in_order(
        self, name: str, entry: Entry, start: int, stop: int, read: Callable[[int, int], torch.Tensor]
    ) -> torch.Tensor:
        """Rows [start, stop), out of ggml's rotary order where they are in it; whole heads are read for that."""
        if not is_permuted(name, self._arch):
            return read(start, stop)
        heads = self.config["num_attention_heads" if ".q_proj." in name else "num_key_value_heads"]
        if heads < 1 or entry.shape[0] % (2 * heads):
            raise ModelError(f"{self.place(name)} has {entry.shape[0]} rows, not {heads} heads of an even size.")
        size = entry.shape[0] // heads
        first, last = start // size * size, -(-stop // size) * size
        pairs = read(first, last)
        count = (last - first) // size
        halves = pairs.view(count, size // 2, 2, *pairs.shape[1:]).transpose(1, 2)  # (heads, 2, size / 2, …)
        return halves.reshape(pairs.shape)[start - first : stop - first].contiguous()

    def _tiles(
        self, entry: Entry, rows: tuple[int, int], columns: tuple[int, int], dtype: torch.dtype | None
    ) -> torch.Tensor:
        """The elements [rows) x [columns), a tile of rows at a time; blocks that a cut goes through are read whole."""
        import torch

        from ringlm.weights.blocks import dequantize

        block, block_bytes = _FORMATS[entry.dtype]
        plain = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}.get(entry.dtype)
        (row_start, row_stop), (column_start, column_stop) = rows, columns
        out = torch.empty(row_stop - row_start, column_stop - column_start, dtype=dtype or plain or torch.float32)
        if not out.numel():
            return out
        first, last = column_start // block, -(-column_stop // block)
        height = max(1, _TILE // ((last - first) * block))
        for top in range(row_start, row_stop, height):
            bottom = min(top + height, row_stop)
            raw = self._raw(entry, top, bottom, first * block_bytes, last * block_bytes)
            if plain is not None:
                tile = raw.view(plain)
            else:
                tile = dequantize(raw.view(-1, block_bytes), entry.dtype).view(bottom - top, -1)
            lead = first * block
            out[top - row_start : bottom - row_start] = tile[:, column_start - lead : column_stop - lead]
        return out

    def _raw(self, entry: Entry, start: int, stop: int, first: int, last: int) -> torch.Tensor:
        """A copy of bytes [first, last) of rows [start, stop); a vector is a single row."""
        import numpy as np
        import torch

        row_bytes = entry.nbytes // (entry.shape[0] if len(entry.shape) == 2 else 1)
        first_byte = entry.offset + start * row_bytes
        mapped = np.frombuffer(self._data[entry.path], np.uint8, (stop - start) * row_bytes, first_byte)
        copied = torch.from_numpy(mapped.reshape(stop - start, row_bytes)[:, first:last].copy())
        release(self._data[entry.path], first_byte, first_byte + mapped.nbytes)
        return copied

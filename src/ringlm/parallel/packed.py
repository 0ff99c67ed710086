"""Matrices packed in blocks of 32 codes, and their products on the CPU. Knows the shard's rows and columns, no files.

Kernels are compiled by numba for this machine (parallel/kernels): torch's own packed products take a third of the
memory bandwidth without AVX-512 and have none for float32 (docs/performance.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ringlm.parallel.kernels.instructions import LANES
from ringlm.parallel.kernels.products import BLOCK, FORMS, multiply, round_activations


class Blocks(Protocol):
    """Rows of a matrix in blocks of 32 columns: weight = scale * code + minimum.

    codes: 4 bits: uint8 (rows, blocks, 16), element j in the low half of byte j and j + 16 in its high half;
    8 bits: int8 (rows, blocks, 32). scales: float16 (rows, blocks). minimums: likewise, or None for -8 * scale with
    4 bits and 0 with 8 bits.
    """

    @property
    def bits(self) -> int: ...
    @property
    def codes(self) -> Tensor: ...
    @property
    def scales(self) -> Tensor: ...
    @property
    def minimums(self) -> Tensor | None: ...


class Workspace:
    """Where activations are rounded to; shared by all matrices, since one product is made at a time."""

    def __init__(self) -> None:
        self._blocks = 0
        self._tensors: tuple[Tensor, ...] = ()
        self._addresses = (0, 0, 0)

    def addresses(self, blocks: int) -> tuple[int, int, int]:
        """Of room for the codes, scales and sums of `blocks` blocks."""
        if blocks > self._blocks:
            self._blocks = blocks
            self._tensors = (torch.empty(blocks, BLOCK, dtype=torch.int8), torch.empty(blocks), torch.empty(blocks))
            codes, scales, sums = (tensor.data_ptr() for tensor in self._tensors)
            self._addresses = codes, scales, sums
        return self._addresses


class Segment:
    """`rows` consecutive rows of one form, eight side by side in memory: in `tensors`, as an earlier segment's
    `tensors()` were, or zeros on `device`, to be filled in any order. `like` has the form, and a row's blocks.
    """

    def __init__(
        self, like: Blocks, rows: int, device: torch.device, tensors: Mapping[str, Tensor] | None = None
    ) -> None:
        self.form = FORMS.index((like.bits, like.minimums is not None))
        self.rows, self.row_blocks = rows, -(-rows // LANES)
        if tensors is None:
            shape = self.row_blocks, like.scales.shape[1]
            tensors = made = {
                # A block of a row has as many words of 4 bytes as a code has bits.
                "codes": torch.zeros(*shape, like.bits, LANES, 4, dtype=torch.uint8, device=device),
                "scales": torch.zeros(*shape, LANES, dtype=torch.float16, device=device),
            }
            if like.minimums is not None:
                made["minimums"] = torch.zeros(*shape, LANES, dtype=torch.float16, device=device)
        self.codes, self.scales = tensors["codes"], tensors["scales"]
        self.minimums = tensors.get("minimums")

    def tensors(self) -> dict[str, Tensor]:
        """All that it holds, by name."""
        held = {"codes": self.codes, "scales": self.scales}
        return held if self.minimums is None else held | {"minimums": self.minimums}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def addresses(self) -> tuple[int, int, int]:
        """Of codes, scales and minimums; 0 where there are none."""
        return (
            self.codes.data_ptr(),
            self.scales.data_ptr(),
            0 if self.minimums is None else self.minimums.data_ptr(),
        )

    def fill(self, first: int, part: Blocks) -> None:
        """Take `part` as the rows from `first` on; the form is this segment's."""
        rows = len(part.codes)
        _place(self.codes, first, part.codes.view(torch.uint8).view(rows, part.codes.shape[1], -1, 4), rows)
        _place(self.scales, first, part.scales, rows)
        if self.minimums is not None:
            assert part.minimums is not None
            _place(self.minimums, first, part.minimums, rows)

    def unpack(self, rows: Tensor) -> Tensor:
        """int64 (n,) to float32 (n, blocks * 32)."""
        block, lane = rows // LANES, rows % LANES
        codes = self.codes[block, :, :, lane].flatten(2)  # (n, blocks, bytes of a block)
        scales = self.scales[block, :, lane].float().unsqueeze(2)  # (n, blocks, 1)
        if FORMS[self.form][0] == 4:
            values = torch.cat((codes & 15, codes >> 4), 2).float()
            if self.minimums is None:
                values -= 8
        else:
            values = codes.view(torch.int8).float()
        if self.minimums is not None:
            return torch.addcmul(self.minimums[block, :, lane].float().unsqueeze(2), values, scales).flatten(1)
        return values.mul_(scales).flatten(1)


class PackedMatrix:
    """The `Storage` of a matrix (out, in) in packed rows, on the CPU.

    `lead` of the first block's columns lie before the matrix, and some of the last one's behind it, where a shard's
    cut goes through a block: they meet zeros. The result for a single token is overwritten by the next one.
    """

    def __init__(
        self, segments: Sequence[Segment], columns: int, lead: int, dtype: torch.dtype, workspace: Workspace
    ) -> None:
        self._segments = [segment for segment in segments if segment.rows]
        self._columns, self._lead, self._dtype, self._workspace = columns, lead, dtype, workspace
        self._blocks = -(-(lead + columns) // BLOCK)
        self._rows = sum(segment.rows for segment in self._segments)
        # A segment's last lanes may write beyond it: the next one overwrites that, the last has room for it.
        self._stride = self._rows + LANES - 1
        self._single = torch.empty(1, self._stride)
        self._threads = torch.get_num_threads()
        self._addresses = [segment.addresses for segment in self._segments]

    @property
    def nbytes(self) -> int:
        return sum(segment.nbytes for segment in self._segments)

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        tokens = len(x)
        exact = x.float().contiguous()
        out = self._single if tokens == 1 else torch.empty(tokens, self._stride)
        codes, scales, sums = self._workspace.addresses(tokens * self._blocks)
        round_activations(exact.data_ptr(), tokens, self._columns, self._lead, self._blocks, codes, scales, sums)
        place = out.data_ptr()
        for segment, addresses in zip(self._segments, self._addresses, strict=True):
            multiply(
                segment.form, *addresses, codes, scales, sums, place,
                segment.row_blocks, self._blocks, tokens, self._stride, self._threads,
            )  # fmt: skip
            place += segment.rows * 4
        result = out[:, : self._rows]
        if bias is not None:
            result.add_(bias)
        return result.to(x.dtype)

    def rows(self, indices: Tensor) -> Tensor:
        out = torch.zeros(len(indices), self._blocks * BLOCK)
        first = 0
        for segment in self._segments:
            inside = (indices >= first) & (indices < first + segment.rows)
            out[inside] = segment.unpack(indices[inside] - first)
            first += segment.rows
        return out[:, self._lead : self._lead + self._columns].to(self._dtype)


def _place(side_by_side: Tensor, first: int, part: Tensor, rows: int) -> None:
    """Copy `part` (rows, blocks, …) to rows `first` on of (row blocks, blocks, [chunks,] 8, …)."""
    lanes = side_by_side.movedim(2 if part.dim() == 2 else 3, 1)  # (row blocks, 8, blocks, …)
    if first % LANES == 0 and rows % LANES == 0:
        lanes[first // LANES : (first + rows) // LANES] = part.view(-1, LANES, *part.shape[1:])
        return
    places = torch.arange(first, first + rows)
    lanes[places // LANES, places % LANES] = part

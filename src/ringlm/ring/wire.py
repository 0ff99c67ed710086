"""The header before every collective's bytes: what both sides must agree on. Format in docs/protocol.md."""

from __future__ import annotations

import ctypes
import enum
import struct

import torch

# sequence number, epoch, operation, dtype, root, bytes that follow
HEADER = struct.Struct("<QIBBHQ")
HEADER_BYTES = HEADER.size

# What ranks send each other in sizes of their own (a step, a setting, logits) is refused above this,
# by the sender and, before memory is taken, by the receiver.
MAX_MESSAGE_BYTES = 1 << 28

DTYPES: dict[torch.dtype, int] = {
    torch.uint8: 0,
    torch.float32: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.float64: 4,
    torch.int32: 5,
    torch.int64: 6,
}
_DTYPE_NAMES = {code: str(dtype).removeprefix("torch.") for dtype, code in DTYPES.items()}


class Operation(enum.IntEnum):
    """What a collective does."""

    ALL_REDUCE = 1
    BROADCAST = 2
    GATHER = 3
    BROADCAST_BYTES = 4
    GATHER_BYTES = 5


def describe(header: bytes | bytearray) -> str:
    """A header in words, for a DesyncError; anything may be in it."""
    if len(header) != HEADER_BYTES:
        return f"unreadable bytes ({bytes(header).hex()})"
    sequence, epoch, operation, dtype, root, nbytes = HEADER.unpack(header)
    if operation not in Operation._value2member_map_ or dtype not in _DTYPE_NAMES:
        return f"unreadable bytes ({bytes(header).hex()})"
    name = Operation(operation).name.lower()
    return f"{name} number {sequence} of {nbytes:,} bytes of {_DTYPE_NAMES[dtype]} (epoch {epoch}, root {root})"


def mismatch(rank: int, mine: bytes, peer: str, theirs: bytes | bytearray) -> str:
    """The message of a DesyncError between rank `rank` and the one that `peer` names."""
    return (
        f"rank {rank} called {describe(mine)} while {peer} called {describe(theirs)}. "
        "All ranks must call the same collectives in the same order."
    )


def view(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, writable, not copied. The caller keeps the tensor alive.

    By ctypes, since `view(uint8).numpy()` takes six times as long.
    """
    nbytes = tensor.nbytes
    if nbytes == 0:
        return memoryview(bytearray())
    return memoryview((ctypes.c_ubyte * nbytes).from_address(tensor.data_ptr()))

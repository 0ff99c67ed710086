"""What stands before the bytes of every frame, and must be the same on both sides. Format in docs/protocol.md.

A frame is a call (which collective this is), the checksum of the frame's body, and the body.
"""

from __future__ import annotations

import ctypes
import enum
import functools
import struct
import zlib
from typing import NamedTuple

import torch
import xxhash

# sequence number (of a letter: its tag), epoch, group, operation, dtype, reduction, root, bytes of the message
_FIELDS = struct.Struct("<QIIBBBBQ")
_CRC = struct.Struct("<I")
CALL_BYTES = _FIELDS.size + _CRC.size
HEADER_BYTES = CALL_BYTES + 8
KIND_BYTES = _FIELDS.size - 8  # of a call, all but the size

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
    torch.int8: 7,
    torch.int16: 8,
    torch.bool: 9,
    torch.complex64: 10,
    torch.complex128: 11,
    torch.float8_e4m3fn: 12,
    torch.float8_e5m2: 13,
}
_DTYPE_NAMES = {code: str(dtype).removeprefix("torch.") for dtype, code in DTYPES.items()}
REDUCTIONS = {"sum": 0, "avg": 1, "product": 2, "min": 3, "max": 4, "and": 5, "or": 6, "xor": 7}
_REDUCTION_NAMES = tuple(REDUCTIONS)

digest = xxhash.xxh3_64_digest  # of a frame's body: 8 bytes
Hasher = xxhash.xxh3_64  # the same, in pieces


class Operation(enum.IntEnum):
    """What a call does."""

    ALL_REDUCE = 1
    BROADCAST = 2
    GATHER = 3
    BROADCAST_BYTES = 4
    GATHER_BYTES = 5
    REDUCE = 6
    ALL_GATHER = 7
    REDUCE_SCATTER = 8
    SCATTER = 9
    ALL_TO_ALL = 10
    BARRIER = 11
    SEND = 12


class Call(NamedTuple):
    """Which call a frame belongs to. The numbers of operation, dtype and reduction are those of this module."""

    sequence: int
    epoch: int
    group: int
    operation: int
    dtype: int
    reduction: int
    root: int
    nbytes: int

    @classmethod
    def unpack(cls, call: bytes | bytearray) -> Call:
        """The fields of a packed call; anything may be in them."""
        return cls(*_FIELDS.unpack_from(call))


def pack_call(*fields: int) -> bytes:
    """A `Call`'s fields to the byte, and a CRC that tells a damaged call from a different one."""
    return _sealed(_FIELDS.pack(*fields))


def _sealed(fields: bytes) -> bytes:
    return fields + _CRC.pack(zlib.crc32(fields))


def resized(call: bytes, nbytes: int) -> bytes:
    """The same call, of a message of `nbytes`."""
    return _sealed(call[:KIND_BYTES] + nbytes.to_bytes(8, "little"))


def nbytes(call: bytes) -> int:
    """The size in a packed call."""
    return int.from_bytes(call[KIND_BYTES : KIND_BYTES + 8], "little")


def intact(call: bytes) -> bool:
    """Whether a call is what was sent."""
    return call == _sealed(call[: -_CRC.size])


def is_letter(call: bytes) -> bool:
    """Whether this is a `send`, which may come before a collective that its receiver is in already."""
    return call[16] == Operation.SEND


def same_kind(one: bytes, other: bytes) -> bool:
    """Whether two calls agree in all but the size."""
    return one[:KIND_BYTES] == other[:KIND_BYTES]


def contradict(one: bytes, other: bytes) -> bool:
    """Whether two ranks that are in these calls wait for each other in vain; anything may be in `other`."""
    if len(other) != CALL_BYTES or is_letter(one) or is_letter(other):
        return False
    return Call.unpack(one).group == Call.unpack(other).group and not same_kind(one, other)


def describe(call: bytes | bytearray) -> str:
    """A call in words, for an error; anything may be in it."""
    known = len(call) == CALL_BYTES and intact(bytes(call))
    fields = Call.unpack(call) if known else None
    if fields is None or fields.operation not in Operation._value2member_map_ or fields.dtype not in _DTYPE_NAMES:
        return f"unreadable bytes ({bytes(call).hex()})"
    what = f"{fields.nbytes:,} bytes of {_DTYPE_NAMES[fields.dtype]}"
    if fields.operation == Operation.SEND:
        return f"send of {what} with tag {fields.sequence} (epoch {fields.epoch})"
    more = f", {_REDUCTION_NAMES[fields.reduction]}" if 0 < fields.reduction < len(REDUCTIONS) else ""
    more += f", group {fields.group:08x}" if fields.group else ""
    name = Operation(fields.operation).name.lower()
    return f"{name} number {fields.sequence} of {what} (epoch {fields.epoch}, root {fields.root}{more})"


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
    return _memory(tensor.data_ptr(), tensor.nbytes)


@functools.lru_cache(maxsize=256)  # a decode step sums the same buffers again and again
def _memory(address: int, nbytes: int) -> memoryview:
    if nbytes == 0:
        return memoryview(bytearray())
    return memoryview((ctypes.c_ubyte * nbytes).from_address(address)).cast("B")

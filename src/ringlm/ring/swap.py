"""A frame to every peer and one from each, as far as that goes at once: what small sums do all the time, compiled by
numba, since Python takes as long for it as the kernel does. Of links that are sealed it moves the bytes alone.

What it does not know: what frames mean, and what is done where one does not come whole or right (`mesh`).
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import socket
import time
from collections.abc import Sequence
from typing import Final

import torch
import xxhash
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

from ringlm.ring import wire
from ringlm.ring.lane import Lane
from ringlm.ring.link import Link
from ringlm.ring.seal import TAG_BYTES, cut
from ringlm.ring.sockets import SPIN_S
from ringlm.ring.wire import CALL_BYTES, HEADER_BYTES

# What there is about a link, in int64 words: its socket; bytes sent and received, and whether those are right; then
# what the kernel reads, two `struct msghdr`, each with its two `struct iovec` (header, body) behind it, of what is sent
# and of what is received.
_SOCKET: Final = 0
_SENT: Final = 1
_GOT: Final = 2
_RIGHT: Final = 3
_OUT: Final = 4
_IN: Final = 15
_WORDS: Final = 26
_HEADER: Final = 7  # of a message's words; the small integers before lie alike on all systems of 64 bits
_BODY: Final = _HEADER + 2
_DIGEST: Final = CALL_BYTES // 8  # of a header's words
_SEALED_BYTES: Final = CALL_BYTES + TAG_BYTES

_NOW: Final = int(socket.MSG_DONTWAIT)
_SPIN_NS: Final = int(SPIN_S * 1e9)
_CLOCK: Final = int(time.CLOCK_MONOTONIC)

_sendmsg = types.ExternalFunction("sendmsg", types.intp(types.intc, types.intp, types.intc))
_recvmsg = types.ExternalFunction("recvmsg", types.intp(types.intc, types.intp, types.intc))
_recv = types.ExternalFunction("recv", types.intp(types.intc, types.intp, types.uintp, types.intc))
_yield_core = types.ExternalFunction("sched_yield", types.intc())
_gettime = types.ExternalFunction("clock_gettime", types.intc(types.intc, types.intp))


@intrinsic
def _words(typing, address):
    """An address as a pointer to int64."""
    return types.CPointer(types.int64)(address), lambda context, b, signature, values: b.inttoptr(
        values[0], ir.IntType(64).as_pointer()
    )


@intrinsic
def _floats(typing, address):
    """An address as a pointer to float32."""
    return types.CPointer(types.float32)(address), lambda context, b, signature, values: b.inttoptr(
        values[0], ir.FloatType().as_pointer()
    )


@intrinsic
def _digest(typing, function, address, nbytes):
    """What the function at `function` makes of the bytes at `address`, as it stands in a header."""
    word = ir.IntType(64)
    kind = ir.FunctionType(word, [word, word]).as_pointer()
    return types.int64(function, address, nbytes), lambda context, b, signature, values: b.bswap(
        b.call(b.inttoptr(values[0], kind), values[1:])
    )


@njit(cache=True, nogil=True)
def _receive(fd, message, body, head, whole, room):
    """Yields the core for up to _SPIN_NS at a time, and sleeps for the first byte after that."""
    got, stop, now = 0, 0, carray(_words(room), (2,))
    while True:
        more = _recvmsg(fd, message, _NOW) if got == 0 else _recv(fd, body + got - head, whole - got, _NOW)
        if more > 0:
            got, stop = got + more, 0
            if got == whole or got < head:
                return got
        elif more == 0:
            return got  # the link's end, which whoever reads next finds again
        else:
            _gettime(_CLOCK, room)
            now_ns = now[0] * 1_000_000_000 + now[1]
            if stop == 0:
                stop = now_ns + _SPIN_NS
            elif now_ns > stop:
                break
            _yield_core()
    if got == 0:
        got = max(0, _recvmsg(fd, message, 0))  # asleep, for as long as SO_RCVTIMEO allows
    return got


@njit(cache=True, nogil=True)
def _swap(links, count, head, digest, body, nbytes, add, room):
    """Sends `nbytes` at `body` to the `count` links at `links`, and receives as much from each that took all of it;
    whether everything came, and is right. With `add` what came over the one link is then added to the body. Without a
    `digest` headers of `head` bytes and bodies are sent as they are, and only whether all came is told."""
    table, whole, good = carray(_words(links), (count, _WORDS)), nbytes + head, True
    mine = carray(_words(table[0, _OUT + _HEADER]), (_DIGEST + 1,))
    if digest != 0:
        mine[_DIGEST] = _digest(digest, body, nbytes)
    for link in range(count):
        if digest != 0:
            table[link, _OUT + _BODY] = body
        table[link, _SENT] = max(0, _sendmsg(table[link, _SOCKET], links + (link * _WORDS + _OUT) * 8, _NOW))
    for link in range(count):
        table[link, _GOT], right = 0, False
        if table[link, _SENT] == whole:  # sleeping on one link is safe only once nothing is left to send on it
            message, into = links + (link * _WORDS + _IN) * 8, table[link, _IN + _BODY]
            table[link, _GOT] = _receive(table[link, _SOCKET], message, into, head, whole, room)
            right = digest == 0 and table[link, _GOT] == whole
            if digest != 0 and table[link, _GOT] == whole:
                theirs = carray(_words(table[link, _IN + _HEADER]), (_DIGEST + 1,))
                right = theirs[_DIGEST] == _digest(digest, into, nbytes)
                for word in range(_DIGEST):
                    right = right and theirs[word] == mine[word]
        table[link, _RIGHT] = right
        good = good and right
    if good and add:
        total, other = carray(_floats(body), (nbytes // 4,)), carray(_floats(table[0, _IN + _BODY]), (nbytes // 4,))
        for index in range(nbytes // 4):
            total[index] += other[index]
    return good


class Swap:
    """Swaps of `length` elements of `dtype` with the peers of `links`.

    `contributions` is where those of the peers come, and `bodies` the same as bytes. A frame has `whole` bytes, and
    `adds` tells whether a call can add what came.
    """

    def __init__(self, links: Sequence[Link], dtype: torch.dtype, length: int) -> None:
        scratches = [link.scratch(dtype, length) for link in links]
        self.contributions = [tensor for tensor, _ in scratches]
        self.bodies = [body for _, body in scratches]
        self.adds = dtype is torch.float32 and len(links) == 1
        self._head = torch.zeros(HEADER_BYTES, dtype=torch.uint8)
        self._call = wire.view(self._head)[:CALL_BYTES]
        nbytes = length * dtype.itemsize
        self._words = _table(links, [self._head] * len(links), self.contributions, nbytes)
        self.whole = HEADER_BYTES + nbytes
        self._fixed = self._words.data_ptr(), len(links), HEADER_BYTES, _digest_address()
        self._sizes = nbytes, self._words[-1].data_ptr()

    def __call__(self, call: bytes, flat: torch.Tensor, add: bool) -> bool:
        """Send the frame of `call` whose body is `flat` to every peer, and receive theirs; whether all came whole and
        right. Then, with `add`, theirs is added to `flat`."""
        self._call[:] = call
        nbytes, room = self._sizes
        good: bool = _swap(*self._fixed, flat.data_ptr(), nbytes, add, room)
        return good

    def progress(self, index: int) -> tuple[int, int, bool]:
        """Bytes sent to and received from the peer of that index, and whether its frame is whole and right."""
        sent, got, right = self._words[index, _SENT : _RIGHT + 1].tolist()
        return sent, got, bool(right)

    def resume(self, index: int, lane: Lane, call: bytes, flat: torch.Tensor) -> None:
        """Leave the rest of both frames to a lane of that peer's link."""
        sent, got, _ = self.progress(index)
        out = wire.view(flat)
        lane.resume(call + wire.digest(out), out, sent)
        lane.receive_rest(self.bodies[index], got)


class SealedSwap(Swap):
    """A Swap with links that are all sealed: their frames are sealed before and opened after it."""

    def __init__(self, links: Sequence[Link], dtype: torch.dtype, length: int) -> None:
        nbytes = length * dtype.itemsize
        scratches = [link.scratch(dtype, length) for link in links]
        self.contributions = [tensor for tensor, _ in scratches]
        self.bodies = [body for _, body in scratches]
        self.adds = False
        self._seals = [seal for link in links if (seal := link.seal) is not None]
        heads = [torch.zeros(_SEALED_BYTES, dtype=torch.uint8) for _ in links]
        outgoing, incoming = ([torch.empty(nbytes + TAG_BYTES, dtype=torch.uint8) for _ in links] for _ in range(2))
        self._memory = heads, outgoing, incoming
        self._heads = [wire.view(head) for head in heads]
        self._outgoing = [cut(wire.view(memory)) for memory in outgoing]
        self._incoming = [cut(wire.view(memory)) for memory in incoming]
        views = ((head[:CALL_BYTES], head[CALL_BYTES:]) for head in self._heads)
        cells = range(_OUT + _BODY, _WORDS * len(links), _WORDS)
        self._before = list(zip(cells, self._seals, self._outgoing, views, strict=True))
        headers = [(link.header, memoryview(link.header)[CALL_BYTES:]) for link in links]
        rights = range(_RIGHT, _WORDS * len(links), _WORDS)
        self._after = list(zip(rights, self._seals, self._incoming, headers, self.bodies, strict=True))
        places = [
            memory if seal.encrypts else tensor
            for seal, memory, tensor in zip(self._seals, incoming, self.contributions, strict=True)
        ]
        words = self._words = _table(links, heads, places, nbytes)
        for index, memory in enumerate(outgoing):
            words[index, _OUT + _BODY] = memory.data_ptr()
        self._cells = wire.view(words.view(torch.uint8).reshape(-1)).cast("q")
        self.whole = _SEALED_BYTES + nbytes
        self._arguments = words.data_ptr(), len(links), _SEALED_BYTES, 0, 0, nbytes, False, words[-1].data_ptr()

    def __call__(self, call: bytes, flat: torch.Tensor, add: bool) -> bool:
        """As of a Swap, of which it adds nothing."""
        out, cells = wire.view(flat), self._cells
        for cell, seal, room, (head, head_tag) in self._before:
            head[:] = call
            head_tag[:], _ = seal.close(call, out, room)
            if not seal.encrypts:
                cells[cell] = flat.data_ptr()
        good: bool = _swap(*self._arguments)
        for cell, seal, room, (header, tag), body in self._after:
            if not (cells[cell] and header.startswith(call) and seal.open(call, tag, body, room)):
                cells[cell] = good = False
        return good

    def resume(self, index: int, lane: Lane, call: bytes, flat: torch.Tensor) -> None:
        """As of a Swap. A frame that came whole and did not open is refused there once more: its turn is over."""
        sent, got, _ = self.progress(index)
        seal, body = self._seals[index], self.bodies[index]
        out = self._outgoing[index].body if seal.encrypts else wire.view(flat)
        lane.resume(bytes(self._heads[index]), out, sent)
        if seal.encrypts:
            seal.place(body)[:] = self._incoming[index].body
        lane.receive_rest(body, got)


def _table(
    links: Sequence[Link], heads: Sequence[torch.Tensor], places: Sequence[torch.Tensor], nbytes: int
) -> torch.Tensor:
    """The words of `links`: where their frames' headers are that are sent, and the places where bodies of `nbytes` are
    received. The last row is room for the time."""
    words = torch.zeros(len(links) + 1, _WORDS, dtype=torch.int64)
    for row, link, head, into in zip(words, links, heads, places, strict=False):
        row[_SOCKET] = link.sock.fileno()
        header = torch.frombuffer(link.header, dtype=torch.uint8)
        for message, start, body in ((_OUT, head, 0), (_IN, header, into.data_ptr())):
            vectors = row[message + _HEADER :]
            row[message + 2], row[message + 3] = vectors.data_ptr(), 2  # where they are, and how many
            vectors[:4] = torch.tensor([start.data_ptr(), start.nbytes, body, nbytes])
    return words


def _digest_address() -> int:
    """Where the C function is that makes 64 bits of an address and a length: the one behind `wire.digest`, or, where
    its library hides it, one that goes by way of Python."""
    with contextlib.suppress(ImportError, OSError, AttributeError):
        return _address(ctypes.CDLL(importlib.import_module("xxhash._xxhash").__file__).XXH3_64bits)
    return _address(_by_python)


def _address(function: object) -> int:
    address = ctypes.cast(function, ctypes.c_void_p).value  # type: ignore[arg-type]
    assert address is not None
    return address


@ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t)
def _by_python(address: int, nbytes: int) -> int:
    return xxhash.xxh3_64_intdigest(ctypes.string_at(address, nbytes))

"""Packed rows to bfloat16, a tile at a time, for products with many activations: a CPU with instructions for bfloat16
multiplies those several times faster than bytes, once enough rows share the unpacking. And single rows to float32, for
embeddings. Knows tiles, no matrices."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from llvmlite import ir
from numba import carray, njit, prange, types
from numba.extending import intrinsic

from ringlm.parallel.kernels import instructions as at
from ringlm.parallel.kernels.instructions import F16, F32, I8, I16, I32, I64, ROWS, constant, load, spread, vector
from ringlm.parallel.kernels.products import FORMS
from ringlm.parallel.kernels.rows import BLOCK, floats, words
from ringlm.parallel.kernels.variants import compiled

_HALF: Final = BLOCK // 2  # elements that are unpacked together


@intrinsic(prefer_literal=True)
def _unpack_block(typing, form, codes, scales, minimums, out, stride):
    """One block of ROWS rows to bfloat16 at `out`, whose rows are `stride` elements apart. All arguments are integers,
    pointers included; `form` is a literal."""
    bits, has_minimum = FORMS[form.literal_value]
    signature = types.void(form, *[types.intp] * 5)

    def generate(context: Any, b: at.Builder, signature: Any, arguments: Any) -> at.Value:
        codes, scales, minimums, out = (
            b.inttoptr(value, kind.as_pointer())
            for value, kind in zip(arguments[1:5], (I8, F16, F16, I16), strict=True)
        )
        for lane in range(ROWS):
            place = ir.Constant(I64, lane)
            scale = b.fpext(load(b, scales, place, F16), F32)
            if has_minimum:
                minimum = b.fpext(load(b, minimums, place, F16), F32)
            else:
                minimum = b.fmul(scale, ir.Constant(F32, -8.0 if bits == 4 else 0.0))
            row = b.gep(out, [b.mul(arguments[5], place)])
            for half, values in enumerate(_halves(b, codes, lane, bits)):
                exact = at.multiply_add(b, values, spread(b, scale, _HALF), spread(b, minimum, _HALF))
                target = b.bitcast(b.gep(row, [ir.Constant(I64, half * _HALF)]), vector(I16, _HALF).as_pointer())
                b.store(_to_bfloat16(b, exact), target).align = 2
        return context.get_dummy_value()

    return signature, generate


def _halves(b: at.Builder, codes: at.Value, lane: int, bits: int) -> list[at.Value]:
    """A row's 32 codes as float32, 16 at a time."""
    words = [load(b, codes, ir.Constant(I64, (chunk * ROWS + lane) * 4), I32) for chunk in range(bits)]
    fours = [_join(b, words[first : first + 4]) for first in range(0, bits, 4)]
    if bits == 8:
        return [b.sitofp(b.sext(part, vector(I32, _HALF)), vector(F32, _HALF)) for part in fours]
    (quads,) = fours
    parts = b.and_(quads, constant(I8, 15, _HALF)), b.lshr(quads, constant(I8, 4, _HALF))
    return [b.sitofp(b.zext(part, vector(I32, _HALF)), vector(F32, _HALF)) for part in parts]


def _join(b: at.Builder, words: list[at.Value]) -> at.Value:
    """Four words of 4 bytes as <16 x i8>."""
    joined = ir.Constant(vector(I32, 4), ir.Undefined)
    for index, word in enumerate(words):
        joined = b.insert_element(joined, word, ir.Constant(I32, index))
    return b.bitcast(joined, vector(I8, _HALF))


def _to_bfloat16(b: at.Builder, values: at.Value) -> at.Value:
    """The upper halves of float32, to the nearest, ties to even; llvmlite has no such type. Finite values only."""
    words = b.bitcast(values, vector(I32, _HALF))
    upper = b.lshr(words, constant(I32, 16, _HALF))
    nearest = b.add(b.and_(upper, constant(I32, 1, _HALF)), constant(I32, 0x7FFF, _HALF))
    return b.trunc(b.lshr(b.add(words, nearest), constant(I32, 16, _HALF)), vector(I16, _HALF))


def _compile(form: int) -> Any:
    """Unpacks row blocks `first` to `last` of a segment of form `form`, compiled when first called and kept on disk."""
    code_bytes = ROWS * BLOCK * FORMS[form][0] // 8

    def unpack(codes, scales, minimums, out, first, last, blocks):
        for n in range(first, last):
            for block in range(blocks):
                place = n * blocks + block
                _unpack_block(
                    form,
                    codes + place * code_bytes,
                    scales + place * ROWS * 2,
                    minimums + place * ROWS * 2,
                    out + ((n - first) * ROWS * blocks + block) * BLOCK * 2,
                    blocks * BLOCK,
                )

    return compiled(unpack, form)


_unpack_0, _unpack_1, _unpack_2, _unpack_3 = (_compile(form) for form in range(len(FORMS)))


@njit(cache=True, nogil=True)
def unpack(form, codes, scales, minimums, out, first, last, blocks):
    """Blocks `first` to `last` of ROWS rows, to bfloat16 (rows, blocks * 32) at `out`. All arguments are integers,
    addresses included."""
    if form == 0:
        _unpack_0(codes, scales, minimums, out, first, last, blocks)
    elif form == 1:
        _unpack_1(codes, scales, minimums, out, first, last, blocks)
    elif form == 2:
        _unpack_2(codes, scales, minimums, out, first, last, blocks)
    else:
        _unpack_3(codes, scales, minimums, out, first, last, blocks)


@njit(cache=True, nogil=True, parallel=True)
def unpack_by_threads(threads, form, codes, scales, minimums, out, first, last, blocks):
    """`unpack` by several threads."""
    count = last - first
    for part in prange(threads):
        start, stop = first + count * part // threads, first + count * (part + 1) // threads
        place = out + (start - first) * ROWS * blocks * BLOCK * 2
        unpack(form, codes, scales, minimums, place, start, stop, blocks)


@intrinsic
def _codes(typing, address):
    """An address as a pointer to int8."""
    return types.CPointer(types.int8)(address), lambda context, b, signature, values: b.inttoptr(
        values[0], I8.as_pointer()
    )


@intrinsic
def _half(typing, address):
    """The float16 at an address, as float32."""
    return types.float32(address), lambda context, b, signature, values: b.fpext(
        b.load(b.inttoptr(values[0], F16.as_pointer())), F32
    )


@njit(cache=True, nogil=True)
def unpack_rows(bits, codes, scales, minimums, indices, count, first, rows, blocks, out):
    """Those of `count` int64 `indices` that are in [first, first + rows), the numbers of a segment's rows, to float32
    (count, blocks * 32) at `out`; nothing is written for the others. `minimums` is 0 where there are none. All
    arguments are integers, addresses included."""
    wanted, result = carray(words(indices), (count,)), carray(floats(out), (count, blocks * BLOCK))
    for index in range(count):
        row = wanted[index] - first
        if not 0 <= row < rows:
            continue
        lane = row % ROWS
        for block in range(blocks):
            place = row // ROWS * blocks + block
            scale = _half(scales + (place * ROWS + lane) * 2)
            minimum = scale * np.float32(-8 if bits == 4 else 0)
            if minimums:
                minimum = _half(minimums + (place * ROWS + lane) * 2)
            for chunk in range(bits):
                word = carray(_codes(codes + ((place * bits + chunk) * ROWS + lane) * 4), (4,))
                for byte in range(4):
                    column = block * BLOCK + chunk * 4 + byte
                    if bits == 4:
                        result[index, column] = scale * np.float32(word[byte] & 15) + minimum
                        result[index, column + _HALF] = scale * np.float32(word[byte] >> 4 & 15) + minimum
                    else:
                        result[index, column] = scale * np.float32(word[byte]) + minimum

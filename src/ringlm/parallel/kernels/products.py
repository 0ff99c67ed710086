"""Matrices in blocks of 32 codes times activations: tiles in registers, and the loops around them.

A matrix is held ROWS rows at a time (`Segment` in parallel/packed.py), so that one load brings four codes of each
of them. Activations are rounded to 8 bits by blocks of 32, each with its own scale, as llama.cpp does (its
Q8_0): the products are then sums of bytes, which a CPU does several times faster than it multiplies floats.

    weight = scale * code + minimum        x = x_scale * x_code
    sum of weight * x = scale * x_scale * sum(code * x_code) + minimum * x_scale * sum(x_code)
"""

from __future__ import annotations

from typing import Any, Final

from llvmlite import ir
from numba import carray, config, njit, prange, set_num_threads, types
from numba.core import cgutils
from numba.extending import intrinsic

from ringlm.parallel.kernels import instructions as at
from ringlm.parallel.kernels.instructions import F16, F32, I8, I64, ROWS, constant, load, spread, vector
from ringlm.parallel.kernels.rows import BLOCK, gate_multiply, rms_norm, round_activations, words
from ringlm.parallel.kernels.variants import compiled

TOKENS: Final = 4  # in a tile of registers
_PANEL: Final = 8  # blocks of rows that stay in the cache while all tokens pass

# Codes are asked for long before they are needed: the hardware's own prefetching stops at every page of 4 KiB, and
# reads at two thirds of the speed.
_AHEAD_BYTES: Final = 4096
_LINE_BYTES: Final = 64  # of a cache

# How a matrix is packed: bits of a code, and whether blocks have a minimum; without one, 4-bit codes count from -8.
FORMS: Final = ((4, False), (4, True), (8, False), (8, True))

_dot = at.dot_of_host()


@intrinsic(prefer_literal=True)
def _tile(typing, form, tokens, codes, scales, minimums, x_codes, x_scales, x_sums, out, blocks, out_stride):
    """ROWS rows times `tokens` activations, to out[token * out_stride: + ROWS]. All arguments are integers, pointers
    included; `form` and `tokens` are literals."""
    bits, has_minimum = FORMS[form.literal_value]
    count: int = tokens.literal_value
    signature = types.void(form, tokens, *[types.intp] * 9)

    def generate(context: Any, b: at.Builder, signature: Any, arguments: Any) -> at.Value:
        pointers = [
            b.inttoptr(value, kind.as_pointer())
            for value, kind in zip(arguments[2:9], (I8, F16, F16, I8, F32, F32, F32), strict=True)
        ]
        codes, scales, minimums, x_codes, x_scales, x_sums, out = pointers
        blocks, out_stride = arguments[9:]

        def row(base: at.Value, token: int, stride: at.Value) -> at.Value:
            return b.gep(base, [b.mul(stride, ir.Constant(I64, token))])

        every = range(count)
        x_rows = [row(x_codes, token, b.mul(blocks, ir.Constant(I64, BLOCK))) for token in every]
        scale_rows = [row(x_scales, token, blocks) for token in every]
        sum_rows = [row(x_sums, token, blocks) for token in every]
        totals = [cgutils.alloca_once_value(b, constant(F32, 0.0, ROWS)) for _ in every]
        with cgutils.for_range(b, blocks) as loop:
            block = loop.index
            dots = _block(b, bits, codes, x_rows, block)
            place = b.mul(block, ir.Constant(I64, ROWS))
            scale = b.fpext(load(b, scales, place, vector(F16, ROWS)), vector(F32, ROWS))
            minimum = None
            if has_minimum:
                minimum = b.fpext(load(b, minimums, place, vector(F16, ROWS)), vector(F32, ROWS))
            for token in every:
                dot = b.sitofp(dots[token], vector(F32, ROWS))
                x_scale = spread(b, load(b, scale_rows[token], block, F32), ROWS)
                total = b.load(totals[token])
                if minimum is not None or bits == 4:
                    x_sum = spread(b, load(b, sum_rows[token], block, F32), ROWS)
                    offset = b.fmul(scale, constant(F32, -8.0, ROWS)) if minimum is None else minimum
                    total = at.multiply_add(b, offset, x_sum, total)
                total = at.multiply_add(b, dot, b.fmul(scale, x_scale), total)
                b.store(total, totals[token])
        for token in every:
            place = b.bitcast(row(out, token, out_stride), vector(F32, ROWS).as_pointer())
            b.store(b.load(totals[token]), place).align = 4
        return context.get_dummy_value()

    return signature, generate


def _block(b: at.Builder, bits: int, codes: at.Value, x_rows: list[at.Value], block: at.Value) -> list[at.Value]:
    """For each token the sums of products over one block of 32 columns, <ROWS x i32>."""
    chunks = BLOCK * bits // 32  # of 4 bytes a row
    base = b.gep(codes, [b.mul(block, ir.Constant(I64, chunks * 4 * ROWS))])
    first = b.mul(block, ir.Constant(I64, BLOCK))
    sums: list[at.Value | None] = [None] * len(x_rows)
    add = _dot.add_unsigned if bits == 4 else _dot.add_signed
    for chunk in range(chunks):
        place = chunk * 4 * ROWS
        if place % _LINE_BYTES == 0:
            at.prefetch(b, base, place + _AHEAD_BYTES)
        raw = load(b, base, ir.Constant(I64, place), vector(I8, 4 * ROWS))
        parts = [(raw, 4 * chunk)]
        if bits == 4:  # elements 0 to 15 of a block in the low halves of its bytes, 16 to 31 in the high ones
            low = b.and_(raw, constant(I8, 15, 4 * ROWS))
            high = b.lshr(raw, constant(I8, 4, 4 * ROWS))
            parts = [(low, 4 * chunk), (high, 16 + 4 * chunk)]
        for token, x_row in enumerate(x_rows):
            for part, offset in parts:
                word = load(b, x_row, b.add(first, ir.Constant(I64, offset)), at.I32)
                x = b.bitcast(spread(b, word, ROWS), vector(I8, 4 * ROWS))
                sums[token] = add(b, sums[token], part, x)
    return [_dot.finish(b, total, bits == 4) for total in sums]


def _compile(form: int) -> Any:
    """The product of a matrix packed in form `form`, compiled when first called and kept on disk.

    Row blocks `first` to `last`, of ROWS rows each, of the matrix times rounded activations, to float32 out
    (tokens, stride). All arguments are integers, pointers included.
    """
    bytes_of_block = ROWS * BLOCK * FORMS[form][0] // 8

    def product(codes, scales, minimums, x_codes, x_scales, x_sums, out, first, last, blocks, tokens, stride):
        codes_step, scales_step = blocks * bytes_of_block, blocks * ROWS * 2
        for top in range(first, last, _PANEL):
            bottom = min(top + _PANEL, last)
            token = 0
            while token < tokens:
                xc, xs, xt = (
                    x_codes + token * blocks * BLOCK,
                    x_scales + token * blocks * 4,
                    x_sums + token * blocks * 4,
                )
                left = tokens - token
                for n in range(top, bottom):
                    c, s, m = codes + n * codes_step, scales + n * scales_step, minimums + n * scales_step
                    place = out + (token * stride + n * ROWS) * 4
                    if left >= 4:
                        _tile(form, 4, c, s, m, xc, xs, xt, place, blocks, stride)
                    elif left >= 2:
                        _tile(form, 2, c, s, m, xc, xs, xt, place, blocks, stride)
                    else:
                        _tile(form, 1, c, s, m, xc, xs, xt, place, blocks, stride)
                token += 4 if left >= 4 else (2 if left >= 2 else 1)

    return compiled(product, form)


_product_0, _product_1, _product_2, _product_3 = (_compile(form) for form in range(len(FORMS)))


# What to do with the activations first.
PLAIN: Final = 0
NORM: Final = 1  # their RMS norm
SILU_GATE: Final = 2  # silu of the first half of a row times the second
GELU_GATE: Final = 3
SEGMENT_WORDS: Final = 6
HEAD_WORDS: Final = 7


@njit(cache=True, nogil=True)
def multiply(form, c, s, m, xc, xs, xt, out, first, last, blocks, tokens, stride):
    if form == 0:
        _product_0(c, s, m, xc, xs, xt, out, first, last, blocks, tokens, stride)
    elif form == 1:
        _product_1(c, s, m, xc, xs, xt, out, first, last, blocks, tokens, stride)
    elif form == 2:
        _product_2(c, s, m, xc, xs, xt, out, first, last, blocks, tokens, stride)
    else:
        _product_3(c, s, m, xc, xs, xt, out, first, last, blocks, tokens, stride)


@njit(cache=True, nogil=True, parallel=True)
def _multiply_by_threads(threads, form, c, s, m, xc, xs, xt, out, row_blocks, blocks, tokens, stride):
    for part in prange(threads):
        first, last = row_blocks * part // threads, row_blocks * (part + 1) // threads
        multiply(form, c, s, m, xc, xs, xt, out, first, last, blocks, tokens, stride)


def work_bytes(tokens: int, columns: int, blocks: int) -> int:
    """What `linear` needs to work in."""
    return tokens * (columns * 4 + blocks * (BLOCK + 8))


@njit(cache=True, nogil=True)
def prepare(plan, x, x_stride, tokens, eps, work):
    """The norm or gate that `plan` asks for, then rounding; addresses of codes, scales and sums."""
    head = carray(words(plan), (HEAD_WORDS,))
    kind, columns, lead, blocks, weight = head[0], head[1], head[2], head[3], head[5]
    scales = work + tokens * columns * 4
    sums = scales + tokens * blocks * 4
    codes = sums + tokens * blocks * 4
    if kind == NORM:
        rms_norm(x, weight, tokens, columns, eps, work)
        x = work
    elif kind != PLAIN:
        gate_multiply(x, tokens, columns, x_stride, kind == GELU_GATE, work)
        x = work
    round_activations(x, tokens, columns, lead, blocks, codes, scales, sums)
    return codes, scales, sums


@njit(cache=True, nogil=True)
def linear(plan, x, x_stride, tokens, eps, work, out):
    """A packed matrix times `tokens` activations at `x`, `x_stride` elements apart: float32 at `out`.

    `plan` has int64 words: kind (PLAIN, NORM or a gate), columns, lead (columns of the first block that lie before the
    matrix), blocks, elements from one token's result to the next, the norm's weight, the number of segments; then for
    each segment of rows its form, codes, scales, minimums, rows, and blocks of ROWS rows. Addresses are integers;
    `work` has room for `work_bytes`.
    """
    codes, scales, sums = prepare(plan, x, x_stride, tokens, eps, work)
    head = carray(words(plan), (HEAD_WORDS,))
    for segment in range(head[6]):
        p = carray(words(plan + (HEAD_WORDS + segment * SEGMENT_WORDS) * 8), (SEGMENT_WORDS,))
        multiply(p[0], p[1], p[2], p[3], codes, scales, sums, out, 0, p[5], head[3], tokens, head[4])
        out += p[4] * 4


def linear_by_threads(
    threads: int, plan: list[int], address: int, x: int, x_stride: int, tokens: int, eps: float, work: int, out: int
) -> None:
    """`linear` by several threads; `plan` are the words at `address`."""
    set_num_threads(min(threads, config.NUMBA_NUM_THREADS))
    rounded = prepare(address, x, x_stride, tokens, eps, work)
    for first in range(HEAD_WORDS, len(plan), SEGMENT_WORDS):
        form, codes, scales, minimums, rows, row_blocks = plan[first : first + SEGMENT_WORDS]
        _multiply_by_threads(
            threads, form, codes, scales, minimums, *rounded, out, row_blocks, plan[3], tokens, plan[4]
        )
        out += rows * 4

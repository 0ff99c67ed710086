"""The dot product of bytes as this machine does it, as LLVM instructions. Knows vectors, no matrices.

ROWS rows of a matrix go side by side: lane i of a vector belongs to row i, and holds four codes of it. One
activation of four bytes is multiplied with all of them:

    lane i += codes[i][0] * x[0] + … + codes[i][3] * x[3]

x86 has this in one instruction with VNNI and in two or three with AVX2; elsewhere it is spelled out, and LLVM
makes of it what it can.
"""

from __future__ import annotations

from typing import Any, Final, Protocol

from llvmlite import binding, ir

LANES: Final = 8  # of a vector of floats

_FEATURES: Final = binding.get_host_cpu_features()
WIDE: Final = bool(_FEATURES.get("avx512f"))  # vectors of 512 bits
_WIDE_VNNI: Final = bool(_FEATURES.get("avx512vnni"))
ROWS: Final = 16 if _WIDE_VNNI else 8  # of a matrix, side by side

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()

# llvmlite has no types.
Builder = Any
Value = Any


def vector(element: Any, count: int = LANES) -> Any:
    """The type of a vector of `count` elements."""
    return ir.VectorType(element, count)


def constant(element: Any, value: float, count: int = LANES) -> Value:
    """A vector of equal constants."""
    return ir.Constant(vector(element, count), [value] * count)


def load(b: Builder, base: Value, offset: Value, type: Any) -> Value:
    """A value of `type` at `base`, a typed pointer, plus `offset` elements; aligned to nothing."""
    value = b.load(b.bitcast(b.gep(base, [offset]), type.as_pointer()))
    value.align = 1
    return value


def load_first(b: Builder, base: Value, count: Value, type: Any) -> Value:
    """The first `count` elements at `base`, a typed pointer, as a vector of `type` whose other lanes are zero."""
    lanes = ir.Constant(vector(I64, type.count), list(range(type.count)))
    mask = b.icmp_unsigned("<", lanes, spread(b, count, type.count))
    element = "f32" if type.element is F32 else "i16"
    name = f"llvm.masked.load.v{type.count}{element}.p0v{type.count}{element}"
    whole = vector(I16, type.count) if type.element is F16 else type
    place, zeros = b.bitcast(base, whole.as_pointer()), ir.Constant(whole, None)
    return b.bitcast(call(b, name, whole, place, ir.Constant(I32, 1), mask, zeros), type)


def spread(b: Builder, value: Value, count: int = LANES) -> Value:
    """`value` in every lane."""
    undefined = ir.Constant(vector(value.type, count), ir.Undefined)
    first = b.insert_element(undefined, value, ir.Constant(I32, 0))
    return b.shuffle_vector(first, undefined, constant(I32, 0, count))


def call(b: Builder, name: str, result: Any, *arguments: Value) -> Value:
    """Call one of LLVM's own functions."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    function = b.module.globals.get(name) or ir.Function(b.module, kind, name)
    return b.call(function, arguments)


def multiply_add(b: Builder, x: Value, y: Value, z: Value) -> Value:
    """x * y + z for vectors of float32, rounded once."""
    return call(b, f"llvm.fma.v{x.type.count}f32", x.type, x, y, z)


def sum_of(b: Builder, x: Value) -> Value:
    """The sum of a vector of float32, in any order."""
    count = x.type.count
    undefined = ir.Constant(x.type, ir.Undefined)
    while count > 1:  # halves onto halves
        count //= 2
        lanes = [place + count if place < count else place for place in range(x.type.count)]
        x = b.fadd(x, b.shuffle_vector(x, undefined, ir.Constant(vector(I32, x.type.count), lanes)))
    return b.extract_element(x, ir.Constant(I32, 0))


def prefetch(b: Builder, base: Value, nbytes: int) -> None:
    """Bring the line `nbytes` after `base`, a pointer to bytes, into the second level cache; it may be nobody's."""
    kind = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
    function = b.module.globals.get("llvm.prefetch.p0i8") or ir.Function(b.module, kind, "llvm.prefetch.p0i8")
    place = b.gep(base, [ir.Constant(I64, nbytes)])
    b.call(function, [place, ir.Constant(I32, 0), ir.Constant(I32, 2), ir.Constant(I32, 1)])  # to read; data


class Dot(Protocol):
    """How a machine sums products of bytes. Begin with None, add up to eight times, then finish."""

    def add_unsigned(self, b: Builder, sum: Value | None, codes: Value, x: Value) -> Value:
        """The sum with codes 0 to 15 times x -127 to 127, both <ROWS * 4 x i8>, added."""
        ...

    def add_signed(self, b: Builder, sum: Value | None, codes: Value, x: Value) -> Value:
        """The sum with codes -128 to 127 times x -127 to 127 added."""
        ...

    def finish(self, b: Builder, sum: Value, unsigned: bool) -> Value:
        """The sum as <ROWS x i32>."""
        ...


class Portable:
    """Any machine that LLVM compiles for."""

    def add_unsigned(self, b: Builder, sum: Value | None, codes: Value, x: Value) -> Value:
        return self._add(b, sum, b.zext(codes, vector(I32, 4 * ROWS)), x)

    def add_signed(self, b: Builder, sum: Value | None, codes: Value, x: Value) -> Value:
        return self._add(b, sum, b.sext(codes, vector(I32, 4 * ROWS)), x)

    def _add(self, b: Builder, sum: Value | None, codes: Value, x: Value) -> Value:
        products = b.mul(codes, b.sext(x, vector(I32, 4 * ROWS)))
        undefined = ir.Constant(products.type, ir.Undefined)
        for place in range(4):
            lanes = ir.Constant(vector(I32, ROWS), list(range(place, 4 * ROWS, 4)))
            part = b.shuffle_vector(products, undefined, lanes)
            sum = part if sum is None else b.add(sum, part)
        return sum

    def finish(self, b: Builder, sum: Value, unsigned: bool) -> Value:
        return sum


class Avx2:
    """Pairs of products in 16 bits, which hold eight sums of unsigned 4-bit codes: 8 * 2 * 15 * 127 < 2**15."""

    def add_unsigned(self, b: Builder, sum: Value | None, codes: Value, x: Value) -> Value:
        pairs = self._pairs(b, codes, x)
        return pairs if sum is None else b.add(sum, pairs)

    def add_signed(self, b: Builder, sum: Value | None, codes: Value, x: Value) -> Value:
        signed = call(b, "llvm.x86.avx2.psign.b", vector(I8, 4 * ROWS), x, codes)
        quads = self._widen(b, self._pairs(b, _absolute(b, codes), signed))
        return quads if sum is None else b.add(sum, quads)

    def finish(self, b: Builder, sum: Value, unsigned: bool) -> Value:
        return self._widen(b, sum) if unsigned else sum

    def _pairs(self, b: Builder, codes: Value, x: Value) -> Value:
        return call(b, "llvm.x86.avx2.pmadd.ub.sw", vector(I16, 2 * ROWS), codes, x)

    def _widen(self, b: Builder, pairs: Value) -> Value:
        return call(b, "llvm.x86.avx2.pmadd.wd", vector(I32, ROWS), pairs, constant(I16, 1, 2 * ROWS))


class Vnni:
    """One instruction sums four products of a lane in 32 bits."""

    def add_unsigned(self, b: Builder, sum: Value | None, codes: Value, x: Value) -> Value:
        start = constant(I32, 0, ROWS) if sum is None else sum
        words = (b.bitcast(value, vector(I32, ROWS)) for value in (codes, x))
        return call(b, f"llvm.x86.avx512.vpdpbusd.{32 * ROWS}", vector(I32, ROWS), start, *words)

    def add_signed(self, b: Builder, sum: Value | None, codes: Value, x: Value) -> Value:
        signed = b.select(b.icmp_signed("<", codes, constant(I8, 0, 4 * ROWS)), b.neg(x), x)
        return self.add_unsigned(b, sum, _absolute(b, codes), signed)

    def finish(self, b: Builder, sum: Value, unsigned: bool) -> Value:
        return sum


def _absolute(b: Builder, codes: Value) -> Value:
    """128 for -128: the result is unsigned."""
    return call(b, f"llvm.abs.v{4 * ROWS}i8", vector(I8, 4 * ROWS), codes, ir.Constant(ir.IntType(1), 0))


def dot_of_host() -> Dot:
    """The fastest that this machine has."""
    if _WIDE_VNNI or _FEATURES.get("avxvnni"):
        return Vnni()
    return Avx2() if _FEATURES.get("avx2") else Portable()

"""Kernels for the matrix units (AMX) of recent Intel CPUs, compiled by numba, and the instructions that they are made of: `cache.amx` uses them.

The units work on eight tiles of 16 rows of 64 bytes. A product of tiles adds to c [16, 16] (fp32) the product of a [16, 32] (bf16) and
b [16, 16, 2], in which two consecutive rows of the right-hand matrix alternate. Their instructions are LLVM's own; numba has no names for them.
Instructions and kernels share a file because numba's cache of a compiled kernel notices changes of that kernel's file alone.
"""

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

TILE_BYTES = 1024
PARTS = 3
"""Numbers of 8 bits into which one of 24 is split: the bf16 nearest to it, that nearest to what is left, and that nearest to the rest."""

GROUP = PARTS * TILE_BYTES
"""Bytes of all parts of a tile."""

_instruction: Any = intrinsic
compiled: Any = njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract", "nsz"})

# Instructions, by tile number. Tiles 0 to 3 are sums, 4 and 5 left, 6 and 7 right factors.

_BYTE, _WORD = ir.IntType(8), ir.IntType(64)
_POINTER = _BYTE.as_pointer()


def _call(builder: Any, name: str, arguments: list[Any]) -> None:
    kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def _on_memory(name: str, tile: int) -> Any:
    @_instruction
    def instruction(context: Any, address: Any, stride: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            _call(builder, name, [ir.Constant(_BYTE, tile), builder.inttoptr(arguments[0], _POINTER), arguments[1]])
            return context.get_dummy_value()

        return types.void(types.intp, types.intp), generate

    return instruction


def _on_tiles(name: str, *tiles: int) -> Any:
    @_instruction
    def instruction(context: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            _call(builder, name, [ir.Constant(_BYTE, tile) for tile in tiles])
            return context.get_dummy_value()

        return types.void(), generate

    return instruction


def _on_palette(name: str) -> Any:
    @_instruction
    def instruction(context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            _call(builder, name, [builder.inttoptr(arguments[0], _POINTER)])
            return context.get_dummy_value()

        return types.void(types.intp), generate

    return instruction


# Steps on 16 float32 side by side, one vector register. Arguments are addresses.

_SIXTEEN, _SIXTEEN_BITS = ir.VectorType(ir.FloatType(), 16), ir.VectorType(ir.IntType(32), 16)
_SIXTEEN_HALVES = ir.VectorType(ir.IntType(16), 16)
_ALIGNED = 4


def _splat(value: Any, kind: Any) -> Any:
    return ir.Constant(kind, [value] * 16)


def _read(builder: Any, address: Any, offset: int = 0) -> Any:
    at = builder.add(address, ir.Constant(_WORD, offset))
    return builder.load(builder.inttoptr(at, _SIXTEEN.as_pointer()), align=_ALIGNED)


def _write(builder: Any, value: Any, address: Any, offset: int = 0) -> None:
    at = builder.add(address, ir.Constant(_WORD, offset))
    builder.store(value, builder.inttoptr(at, value.type.as_pointer()), align=_ALIGNED)


def _larger(builder: Any, one: Any, other: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", one, other), one, other)


def _times_plus(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return builder.fadd(builder.fmul(a, b, flags=["contract"]), c, flags=["contract"])


def _split(builder: Any, value: Any) -> list[Any]:
    """The upper halves of the bits of its parts, lower halves zero."""
    parts = []
    for _ in range(PARTS):
        rounded = builder.add(builder.bitcast(value, _SIXTEEN_BITS), _splat(0x8000, _SIXTEEN_BITS))
        parts.append(builder.and_(rounded, _splat(-0x10000, _SIXTEEN_BITS)))
        value = builder.fsub(value, builder.bitcast(parts[-1], _SIXTEEN))
    return parts


def _write_pair(builder: Any, even: Any, odd: Any, out: Any, parts: int = PARTS) -> None:
    """The parts of two vectors, number by number beside each other."""
    for part, (below, above) in enumerate(zip(_split(builder, even)[:parts], _split(builder, odd)[:parts], strict=True)):
        _write(builder, builder.or_(builder.lshr(below, _splat(16, _SIXTEEN_BITS)), above), out, part * TILE_BYTES)


def _power_of_two(builder: Any, y: Any) -> Any:
    """2^y for y <= 0, to 3e-7: its series to the sixth power around the nearest whole number. Nothing is smaller than 2^-126."""
    smallest = _splat(-126.0, _SIXTEEN)
    y = builder.select(builder.fcmp_ordered("<", y, smallest), smallest, y)  # NaN stays
    rounds = _splat(12582912.0, _SIXTEEN)  # 1.5 * 2^23: added to it, a float32 has its whole part in its lowest bits, and no other
    shifted = builder.fadd(y, rounds)
    rest = builder.fsub(y, builder.fsub(shifted, rounds))
    power = _splat(_float32(math.log(2) ** 6 / 720), _SIXTEEN)
    for k in range(5, -1, -1):
        power = _times_plus(builder, power, rest, _splat(_float32(math.log(2) ** k / math.factorial(k)), _SIXTEEN))
    exponent = builder.shl(builder.bitcast(shifted, _SIXTEEN_BITS), _splat(23, _SIXTEEN_BITS))
    return builder.bitcast(builder.add(builder.bitcast(power, _SIXTEEN_BITS), exponent), _SIXTEEN)


def _float32(value: float) -> float:
    return float(np.float32(value))


@_instruction
def split_row(context: Any, row: Any, out: Any) -> Any:
    """32 float32 -> 32 bf16 in each part's tile."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        row, out = arguments
        for half in range(2):
            for part, bits in enumerate(_split(builder, _read(builder, row, 64 * half))):
                halves = builder.trunc(builder.lshr(bits, _splat(16, _SIXTEEN_BITS)), _SIXTEEN_HALVES)
                _write(builder, halves, out, part * TILE_BYTES + 32 * half)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), generate


@_instruction
def split_pair(context: Any, even: Any, odd: Any, out: Any) -> Any:
    """Two times 16 float32 -> 16 pairs of bf16 in each part's tile."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        even, odd, out = arguments
        _write_pair(builder, _read(builder, even), _read(builder, odd), out)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), generate


@_instruction
def raise_to(context: Any, rows: Any, highest: Any) -> Any:
    """highest [32] = the largest of itself and of rows [32, 32], in each column."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, highest = arguments
        for half in range(2):
            values = [_read(builder, rows, 128 * row + 64 * half) for row in range(32)]
            while len(values) > 1:
                values = [_larger(builder, one, other) for one, other in zip(values[::2], values[1::2], strict=True)]
            _write(builder, _larger(builder, values[0], _read(builder, highest, 64 * half)), highest, 64 * half)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), generate


@_instruction
def weigh_pair(context: Any, even: Any, odd: Any, factor: Any, highest: Any, total: Any, out: Any) -> Any:
    """2^(factor * (score - highest)) of two times 16 scores, added to total [16] and split into pairs."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        even, odd, factor, highest, total, out = arguments
        empty = ir.Constant(_SIXTEEN, ir.Undefined)
        factors = builder.insert_element(empty, factor, ir.Constant(ir.IntType(32), 0))
        factors = builder.shuffle_vector(factors, empty, ir.Constant(_SIXTEEN_BITS, [0] * 16))
        most = _read(builder, highest)  # taken away first: what counts most is near it, and then exact
        weights = [_power_of_two(builder, builder.fmul(builder.fsub(_read(builder, score), most), factors)) for score in (even, odd)]
        _write(builder, builder.fadd(_read(builder, total), builder.fadd(weights[0], weights[1])), total)
        _write_pair(builder, weights[0], weights[1], out, 2)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.float32, *[types.intp] * 3), generate


load_0, load_1, load_2, load_3, load_4, load_5, load_6, load_7 = (_on_memory("llvm.x86.tileloadd64", tile) for tile in range(8))
store_0, store_1, store_2, store_3 = (_on_memory("llvm.x86.tilestored64", tile) for tile in range(4))
zero_0, zero_1, zero_2, zero_3 = (_on_tiles("llvm.x86.tilezero", tile) for tile in range(4))
add_0, add_1, add_2, add_3 = (_on_tiles("llvm.x86.tdpbf16ps", c, a, b) for c, a, b in ((0, 4, 6), (1, 4, 7), (2, 5, 6), (3, 5, 7)))
configure, configuration = _on_palette("llvm.x86.ldtilecfg"), _on_palette("llvm.x86.sttilecfg")

PALETTE = np.array([1, *[0] * 15, *[64, 0] * 8, *[0] * 16, *[16] * 8, *[0] * 8], np.uint8)
"""Eight tiles of 16 rows of 64 bytes."""


# What the kernels do with the tiles


@compiled
def zero_sums() -> None:
    zero_0()
    zero_1()
    zero_2()
    zero_3()


@compiled
def load_sums(address: int, stride: int) -> None:
    """The sums from [32, 32] float32 whose rows are `stride` bytes apart; of a stride of 0 every row is the same."""
    load_0(address, stride)
    load_1(address + 64, stride)
    load_2(address + 16 * stride, stride)
    load_3(address + 16 * stride + 64, stride)


@compiled
def multiply(a_0: int, a_1: int, b_0: int, b_1: int, depths: int, parts: int) -> None:
    """Adds to the sums (tiles 0 1 / 2 3) the products of two left and two right strips of `depths` tiles, given by their addresses.

    parts: of the right factor, 3, or 2 where the third is zero.
    """
    for depth in range(depths):
        of_a, of_b = depth * GROUP, depth * parts * TILE_BYTES
        second_a, second_b = of_a + TILE_BYTES, of_b + TILE_BYTES
        _load_right(b_0 + of_b, b_1 + of_b)
        _load_left(a_0 + of_a + 2 * TILE_BYTES, a_1 + of_a + 2 * TILE_BYTES)
        _add_products()
        _load_left(a_0 + second_a, a_1 + second_a)
        _add_products()
        _load_left(a_0 + of_a, a_1 + of_a)
        _add_products()
        if parts == 3:
            _load_right(b_0 + of_b + 2 * TILE_BYTES, b_1 + of_b + 2 * TILE_BYTES)
            _add_products()
        _load_right(b_0 + second_b, b_1 + second_b)
        _add_products()
        _load_left(a_0 + second_a, a_1 + second_a)
        _add_products()


@compiled
def _load_left(a_0: int, a_1: int) -> None:
    load_4(a_0, 64)
    load_5(a_1, 64)


@compiled
def _load_right(b_0: int, b_1: int) -> None:
    load_6(b_0, 64)
    load_7(b_1, 64)


@compiled
def _add_products() -> None:
    """Of the two left and the two right tiles, to the four sums."""
    add_0()
    add_1()
    add_2()
    add_3()


@compiled
def keep_sums(address: int, stride: int) -> None:
    """Stores the sums as [32, 32] float32 whose rows are `stride` bytes apart."""
    store_0(address, stride)
    store_1(address + 64, stride)
    store_2(address + 16 * stride, stride)
    store_3(address + 16 * stride + 64, stride)


# The kernels

DEEP = 12
"""Tiles that are summed over at once: more do not stay in the first-level cache."""
PANEL = 384
"""Columns of the result worked on together: their part of the right factor (885 kB) stays in the second-level cache."""


@compiled
def pack_left(x: Any, out: Any) -> None:
    """x [n, k], whose rows are without gaps, as left factor: out [rows / 16, k / 32, 3, 16, 32] (uint16).

    Rows of it beyond n are left as they are.
    """
    _pack_rows(x.ctypes.data, x.strides[0], x.shape[0], out.shape[1], out.ctypes.data, out.shape[1] * GROUP)


@compiled
def _pack_rows(x: int, stride: int, rows: int, depths: int, out: int, strip: int) -> None:
    """The same by addresses: rows of x that are `stride` bytes apart, strips of 16 of them that come out `strip` bytes apart."""
    for row in range(rows):
        at, to = x + row * stride, out + (row // 16) * strip + (row % 16) * 64
        for depth in range(depths):
            split_row(at + depth * 128, to + depth * GROUP)


@compiled
def pack_right(w: Any, out: Any) -> None:
    """w [n, k] likewise, transposed, as right factor: out [n / 16, k / 32, 3, 16, 16] (uint32, pairs of bf16)."""
    pack_left(w, out)
    for group in range(-(-w.shape[0] // 16)):
        for depth in range(out.shape[1]):
            for part in range(PARTS):
                _transpose(out[group, depth, part])


@compiled
def pack_left_transposed(x: Any, out: Any) -> None:
    """x [n, d] likewise, transposed, as left factor: out [d / 16, n / 32, 3, 16, 16] (uint32, pairs of bf16)."""
    stride, nothing = x.strides[0], np.zeros(16, np.float32)
    for group in range(out.shape[0]):
        for depth in range(out.shape[1]):
            for i in range(16):
                row = 32 * depth + 2 * i
                at = x.ctypes.data + row * stride + 64 * group
                even = at if row < x.shape[0] else nothing.ctypes.data
                odd = at + stride if row + 1 < x.shape[0] else nothing.ctypes.data
                split_pair(even, odd, out[group, depth, 0, i].ctypes.data)
            for part in range(PARTS):
                _transpose(out[group, depth, part])


@compiled
def _transpose(tile: Any) -> None:
    for i in range(16):
        for j in range(i):
            tile[i, j], tile[j, i] = tile[j, i], tile[i, j]


@compiled
def product(x: Any, weight: Any, bias: Any, left: Any, y: Any) -> None:
    """y [rows, n] = x [rows, k] times a right factor, plus bias [n].

    y has as many rows as x, rounded up to 32. left: room for x, or as much of its width as is summed over at once, [rows of y / 16, DEEP, 3, 16, 32].
    """
    before = np.empty(64, np.uint8)
    configuration(before.ctypes.data)  # torch's own kernels use the same units: they find them as they left them
    configure(PALETTE.ctypes.data)
    depths, parts, n = weight.shape[1], weight.shape[2], y.shape[1]
    strip, strip_of_weight, stride = DEEP * GROUP, depths * parts * TILE_BYTES, n * 4
    for depth in range(0, depths, DEEP):
        deep = min(DEEP, depths - depth)
        for panel in range(0, n, PANEL):
            for row in range(0, y.shape[0], 32):
                a = left.ctypes.data
                if n > PANEL:  # else nobody needs it again, and it stays in the cache
                    a += (row // 16) * strip
                if panel == 0:
                    _pack_rows(x.ctypes.data + row * x.strides[0] + depth * 128, x.strides[0], min(32, x.shape[0] - row), deep, a, strip)
                for column in range(panel, min(n, panel + PANEL), 32):
                    at = y.ctypes.data + row * stride + column * 4
                    if depth == 0:
                        initial, apart = bias.ctypes.data + column * 4, 0  # the same row sixteen times
                    else:
                        initial, apart = at, stride
                    load_sums(initial, apart)
                    b = weight.ctypes.data + (column // 16) * strip_of_weight + depth * parts * TILE_BYTES
                    multiply(a, a + strip, b, b + strip_of_weight, deep, parts)
                    keep_sums(at, stride)
    configure(before.ctypes.data)


LOG2_E = 1.4426950408889634


@compiled
def attend(query: Any, key: Any, value: Any, scale: float, scratch: Any, out: Any) -> None:
    """out [rows, d] = softmax(scale * query key^T) value, of one head: query [rows, d], key and value [n, d].

    The scores lie transposed, keys by queries, so that a softmax is the same steps for 16 queries side by side. Its weights are split into two
    parts: what they lack averages out.
    scratch: made by `attention_scratch`.
    """
    keys, queries, values, scores, weights, sums = scratch
    before = np.empty(64, np.uint8)
    configuration(before.ctypes.data)
    configure(PALETTE.ctypes.data)
    n, d = key.shape
    pack_left(key, keys)
    pack_left_transposed(value, values)
    depths, blocks = d // 32, scores.shape[0] // 32
    highest, total, of_block = np.empty(32, np.float32), np.empty(32, np.float32), np.empty(16, np.float32)
    factor = np.float32(scale * LOG2_E)
    for first in range(0, query.shape[0], 32):
        pack_right(query[first : first + 32], queries)
        b = queries.ctypes.data
        highest[:] = -np.inf
        for block in range(blocks):
            at, a = scores.ctypes.data + block * 4096, keys.ctypes.data + block * 2 * depths * GROUP
            zero_sums()
            multiply(a, a + depths * GROUP, b, b + depths * GROUP, depths, PARTS)
            keep_sums(at, 128)
            if block == blocks - 1:
                scores[n:] = -np.inf
            raise_to(at, highest.ctypes.data)
        total[:] = 0
        for half in range(2):
            of_half = 64 * half
            for block in range(blocks):
                at, to = scores.ctypes.data + block * 4096 + of_half, weights.ctypes.data + (half * blocks + block) * 2 * TILE_BYTES
                of_block[:] = 0  # sums of sums: fewer roundings
                for pair in range(16):
                    weigh_pair(at + pair * 256, at + pair * 256 + 128, factor, highest.ctypes.data + of_half, of_block.ctypes.data, to + pair * 64)
                for j in range(16):
                    total[16 * half + j] += of_block[j]
        strip = blocks * GROUP
        for part in range(0, d, 32):
            zero_sums()
            a, b = values.ctypes.data + (part // 16) * strip, weights.ctypes.data
            multiply(a, a + strip, b, b + blocks * 2 * TILE_BYTES, blocks, 2)
            keep_sums(sums.ctypes.data + part * 128, 128)
        total[:] = 1 / total
        for j in range(min(32, query.shape[0] - first)):
            for i in range(d):
                out[first + j, i] = sums[i, j] * total[j]
    configure(before.ctypes.data)

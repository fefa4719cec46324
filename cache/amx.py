"""fp32 products on the bf16 matrix units (AMX) of recent Intel CPUs, about twice as fast as on its vector units: kernels for `cache.encoder`.

A number is split into three parts: the bf16 nearest to it, that nearest to what is left, and that nearest to the rest. Together they have fp32's
24 bits. Of the nine terms of a product of two such sums the six largest are added up in fp32, as exactly as fp32 itself would (Henry, Tang,
Heinecke, "Leveraging the bfloat16 artificial intelligence datatype for higher-precision computations", 1904.06376).

The units work on eight tiles of 16 rows of 64 bytes. A product of tiles adds to c [16, 16] (fp32) the product of a [16, 32] (bf16) and
b [16, 16, 2], in which two consecutive rows of the right-hand matrix alternate. Packed matrices are tiles one after the other, the parts of each
in a row: [rows / 16, columns / 32, parts, 16, 32] as left factor, [columns / 16, rows / 32, parts, 16, 16, 2] as right factor, where two bf16
are one uint32. numba compiles the kernels; the instructions of the tiles are LLVM's.
"""

import ctypes
import platform
import sys
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from llvmlite.binding import get_host_cpu_features
from torch import Tensor, nn

from cache.encoder import Plain
from cache.tiles import (
    GROUP,
    PALETTE,
    PARTS,
    TILE_BYTES,
    compiled,
    configuration,
    configure,
    keep_sums,
    load_sums,
    multiply,
    prefetch,
    raise_to,
    split_pair,
    split_row,
    weigh_pair,
    zero_sums,
)

TOLERANCE = 1e-6
"""Largest relative error of a kernel against float64 at which it is used; fp32 has 3e-7."""
DEEP = 12
"""Tiles that are summed over at once: more do not stay in the first-level cache."""
PANEL = 384
"""Columns of the result worked on together: their part of the right factor (885 kB) stays in the second-level cache."""


@compiled
def pack_left(x: Any, out: Any) -> None:
    """x [n, k], whose rows are without gaps, as left factor: out [rows / 16, k / 32, 3, 16, 32] (uint16).

    Rows of it beyond n are left as they are.
    """
    depths, stride = out.shape[1], x.strides[0]
    for row in range(x.shape[0]):
        at, to = x.ctypes.data + row * stride, out.ctypes.data + (row // 16) * depths * GROUP + (row % 16) * 64
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

    left: room for x, [rows rounded up to 32 / 16, k / 32, 3, 16, 32]; y has so many rows too.
    """
    before = np.empty(64, np.uint8)
    configuration(before.ctypes.data)  # torch's own kernels use the same units: they find them as they left them
    configure(PALETTE.ctypes.data)
    pack_left(x, left)
    depths, parts, n = left.shape[1], weight.shape[2], y.shape[1]
    strip, strip_of_weight, stride = depths * GROUP, depths * parts * TILE_BYTES, n * 4
    for depth in range(0, depths, DEEP):
        deep = min(DEEP, depths - depth)
        for panel in range(0, n, PANEL):
            for row in range(0, y.shape[0], 32):
                a = left.ctypes.data + (row // 16) * strip + depth * GROUP
                for column in range(panel, min(n, panel + PANEL), 32):
                    at = y.ctypes.data + row * stride + column * 4
                    if depth == 0:
                        initial, apart = bias.ctypes.data + column * 4, 0  # the same row sixteen times
                    else:
                        initial, apart = at, stride
                    load_sums(initial, apart)
                    for i in range(32):  # so that they need not be waited for when the sums are stored
                        prefetch(at + i * stride)
                        prefetch(at + i * stride + 64)
                    b = weight.ctypes.data + (column // 16) * strip_of_weight + depth * parts * TILE_BYTES
                    multiply(a, a + strip, b, b + strip_of_weight, deep, parts)
                    keep_sums(at, stride)
    configure(before.ctypes.data)


LOG2_E = 1.4426950408889634


@compiled
def attend(query: Any, key: Any, value: Any, scale: float, scratch: Any, out: Any) -> None:
    """out [rows, d] = softmax(scale * query key^T) value, of one head: query [rows, d], key and value [n, d].

    The scores lie transposed, keys by queries, so that a softmax is the same steps for 16 queries side by side.
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
                at, to = scores.ctypes.data + block * 4096 + of_half, weights.ctypes.data + (half * blocks + block) * GROUP
                of_block[:] = 0  # sums of sums: fewer roundings
                for pair in range(16):
                    weigh_pair(at + pair * 256, at + pair * 256 + 128, factor, highest.ctypes.data + of_half, of_block.ctypes.data, to + pair * 64)
                for j in range(16):
                    total[16 * half + j] += of_block[j]
        strip = blocks * GROUP
        for part in range(0, d, 32):
            zero_sums()
            a, b = values.ctypes.data + (part // 16) * strip, weights.ctypes.data
            multiply(a, a + strip, b, b + strip, blocks, PARTS)
            keep_sums(sums.ctypes.data + part * 128, 128)
        total[:] = 1 / total
        for j in range(min(32, query.shape[0] - first)):
            for i in range(d):
                out[first + j, i] = sums[i, j] * total[j]
    configure(before.ctypes.data)


def packed_weight(weight: np.ndarray) -> np.ndarray:
    """weight [n, k] (float32) as right factor of `product`: [n / 16, k / 32, parts, 16, 16]."""
    packed = _aligned((weight.shape[0] // 16, weight.shape[1] // 32, PARTS, 16, 16), np.uint32)
    pack_right(weight, packed)
    if packed[:, :, 2].any():
        return packed
    two = _aligned((*packed.shape[:2], 2, 16, 16), np.uint32)  # all 11 bits of float16, in which Whisper's checkpoints come
    two[:] = packed[:, :, :2]
    return two


def attention_scratch(n: int, d: int) -> tuple[np.ndarray, ...]:
    """Room for `attend` with n keys of width d."""
    blocks = -(-n // 32)
    return (
        _aligned((2 * blocks, d // 32, PARTS, 16, 32), np.uint16),
        _aligned((2, d // 32, PARTS, 16, 16), np.uint32),
        _aligned((d // 16, blocks, PARTS, 16, 16), np.uint32),
        _aligned((32 * blocks, 32), np.float32),
        _aligned((2, blocks, PARTS, 16, 16), np.uint32),
        _aligned((d, 32), np.float32),
    )


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Zeros that begin at a cache line."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    room = np.zeros(size + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + size].view(dtype).reshape(shape)


@cache
def is_exact_here() -> bool:
    """Whether this machine has the units, this process may use them, and what comes out is as exact as fp32: tried once."""
    return _may_be_used() and _error() < TOLERANCE


def _may_be_used() -> bool:
    if sys.platform != "linux" or platform.machine() != "x86_64" or not get_host_cpu_features().get("amx-bf16"):
        return False
    # The kernel gives tiles to a process that asks for them: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
    return ctypes.CDLL(None).syscall(158, 0x1023, 18) == 0


def _error() -> float:
    """Relative, of a product and of an attention, against float64."""
    generator = np.random.default_rng(0)
    x, weight = (generator.standard_normal(shape).astype(np.float32) for shape in ((100, 96), (64, 96)))
    y = np.empty((128, 64), np.float32)
    product(x, packed_weight(weight), np.ones(64, np.float32), _aligned((8, 3, PARTS, 16, 32), np.uint16), y)
    query, key, value = (generator.standard_normal((100, 32)).astype(np.float32) for _ in range(3))
    out = np.empty_like(query)
    attend(query, key, value, 0.5, attention_scratch(100, 32), out)
    scores = np.exp(0.5 * query.astype(np.float64) @ key.T)
    exact = x.astype(np.float64) @ weight.T + 1, scores @ value / scores.sum(1, keepdims=True)
    return max(float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)) for ours, theirs in zip((y[:100], out), exact, strict=True))


class Amx:
    """The arithmetic of `cache.encoder` on these units. Keeps every weight packed, as large as it was, from its first use on."""

    def __init__(self) -> None:
        self._weights: dict[nn.Module, np.ndarray] = {}
        self._scratch: dict[tuple[int, int], tuple[np.ndarray, ...]] = {}
        self._left = np.empty(0, np.uint16)

    def linear(self, x: Tensor, layer: nn.Linear) -> Tensor:
        """x [batch, n, in] -> [batch, n, out], as `layer` does."""
        return self._product(x.reshape(-1, x.shape[-1]), layer, layer.weight).reshape(*x.shape[:-1], -1)

    def attention(self, query: Tensor, key: Tensor, value: Tensor, n_head: int) -> Tensor:
        """Of every head, side by side: query [batch, rows, d], key and value [batch, n, d] -> [batch, rows, d]."""
        width, n = query.shape[-1] // n_head, key.shape[1]
        if width % 32:
            return Plain().attention(query, key, value, n_head)
        if (n, width) not in self._scratch:
            self._scratch = {(n, width): attention_scratch(n, width)}
        out = torch.empty_like(query)
        for one in zip(query, key, value, out, strict=True):
            arrays = [tensor.numpy() for tensor in one]
            for head in range(0, query.shape[-1], width):
                attend(
                    *(array[:, head : head + width] for array in arrays[:3]), width**-0.5, self._scratch[n, width], arrays[3][:, head : head + width]
                )
        return out

    def convolution(self, x: Tensor, layer: nn.Conv1d) -> Tensor:
        """x [batch, n, in] -> [batch, n / stride, out], as `layer` (three wide, one of padding) does: a product with three rows side by side."""
        n, width = x.shape[1:]
        weight = layer.weight.permute(0, 2, 1).flatten(1)  # [out, 3 * in]
        weight = F.pad(weight, (0, -weight.shape[1] % 32))
        step = layer.stride[0]
        outputs = []
        for one in x:
            padded = F.pad(one, (0, 0, 1, 1 + 32 // width + 1))  # the last rows reach beyond the end, where weights are zero
            rows = padded.as_strided((n // step, weight.shape[1]), (step * width, 1))
            outputs.append(self._product(rows, layer, weight))
        return torch.stack(outputs)

    def _product(self, x: Tensor, layer: Any, weight: Tensor) -> Tensor:
        (n, k), width = x.shape, weight.shape[0]
        if k % 32 or width % 32:
            return F.linear(x, weight, layer.bias)  # no Whisper of OpenAI's has such a width
        if layer not in self._weights:
            self._weights[layer] = packed_weight(weight.contiguous().numpy())
        rows = -(-n // 32) * 32
        if self._left.size < rows * k * PARTS:
            self._left = _aligned((rows * k * PARTS,), np.uint16)
        left = self._left[: rows * k * PARTS].reshape(rows // 16, k // 32, PARTS, 16, 32)
        bias = torch.zeros(width) if layer.bias is None else layer.bias
        y = torch.empty(rows, width)
        product(x.numpy(), self._weights[layer], bias.numpy(), left, y.numpy())
        return y[:n]

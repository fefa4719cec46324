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
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from llvmlite.binding import get_host_cpu_features
from torch import Tensor, nn

from cache.encoder import Plain
from cache.tiles import DEEP, PARTS, attend, pack_right, product

TOLERANCE = 3e-6
"""Largest relative error of a kernel against float64 at which it is used. Products have 3e-7, as fp32 has, attention up to 1.5e-6."""


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
        _aligned((2, blocks, 2, 16, 16), np.uint32),
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
    """Whether the units are here, and what comes out of them is as exact as fp32: tried once."""
    return are_here() and _error() < TOLERANCE


def are_here() -> bool:
    """Whether this machine has the units and this process may use them."""
    if sys.platform != "linux" or platform.machine() != "x86_64" or not get_host_cpu_features().get("amx-bf16"):
        return False
    # The kernel gives tiles to a process that asks for them: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
    return ctypes.CDLL(None).syscall(158, 0x1023, 18) == 0


def _error() -> float:
    """Relative, of a product and of an attention, against float64."""
    generator = np.random.default_rng(0)
    x, weight = (generator.standard_normal(shape).astype(np.float32) for shape in ((100, 96), (64, 96)))
    y = np.empty((128, 64), np.float32)
    product(x, packed_weight(weight), np.ones(64, np.float32), _aligned((8, DEEP, PARTS, 16, 32), np.uint16), y)
    query, key, value = (generator.standard_normal((100, 32)).astype(np.float32) for _ in range(3))
    out = np.empty_like(query)
    attend(query, key, value, 0.5, attention_scratch(100, 32), out)
    scores = np.exp(0.5 * query.astype(np.float64) @ key.T)
    exact = x.astype(np.float64) @ weight.T + 1, scores @ value / scores.sum(1, keepdims=True)
    return max(float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)) for ours, theirs in zip((y[:100], out), exact, strict=True))


class Amx:
    """The arithmetic of `cache.encoder` on these units. Keeps every weight packed, as large as it was, from its first use on."""

    def __init__(self) -> None:
        self._weights: dict[nn.Module, tuple[np.ndarray, np.ndarray]] = {}
        self._local = threading.local()
        self._left = _aligned((0, DEEP, PARTS, 16, 32), np.uint16)

    def linear(self, x: Tensor, layer: nn.Linear) -> Tensor:
        """x [batch, n, in] -> [batch, n, out], as `layer` does."""
        return self._product(x.reshape(-1, x.shape[-1]), layer).reshape(*x.shape[:-1], -1)

    def attention(self, query: Tensor, key: Tensor, value: Tensor, n_head: int) -> Tensor:
        """Of every head, side by side: query [batch, rows, d], key and value [batch, n, d] -> [batch, rows, d]."""
        width, n = query.shape[-1] // n_head, key.shape[1]
        if width % 32:
            return Plain().attention(query, key, value, n_head)
        out = torch.empty_like(query)
        for one in zip(query, key, value, out, strict=True):
            arrays = [tensor.numpy() for tensor in one]

            def run(head: int, arrays: list[np.ndarray] = arrays) -> None:
                q, k, v, result = (array[:, head * width : (head + 1) * width] for array in arrays)
                attend(q, k, v, width**-0.5, self._scratch(n, width), result)

            _each(run, n_head)
        return out

    def convolution(self, x: Tensor, layer: nn.Conv1d) -> Tensor:
        """x [batch, n, in] -> [batch, n / stride, out], as `layer` (three wide, one of padding) does: a product with three rows side by side."""
        n, width = x.shape[1:]
        step, outputs = layer.stride[0], []
        for one in x:
            padded = F.pad(one, (0, 0, 1, 1 + 32 // width + 1))  # the last rows reach beyond the end, where weights are zero
            rows = padded.as_strided((n // step, _to_32(3 * width)), (step * width, 1))
            outputs.append(self._product(rows, layer))
        return torch.stack(outputs)

    def _product(self, x: Tensor, layer: nn.Linear | nn.Conv1d) -> Tensor:
        n, width = len(x), len(layer.weight)
        if x.shape[1] % 32 or width % 32:
            return F.linear(x, _matrix(layer), layer.bias)  # no Whisper of OpenAI's has such a width
        if layer not in self._weights:
            added = torch.zeros(width) if layer.bias is None else layer.bias
            self._weights[layer] = packed_weight(_matrix(layer).contiguous().numpy()), added.numpy()
        weight, bias = self._weights[layer]
        rows = _to_32(n)
        if len(self._left) < rows // 16:
            self._left = _aligned((rows // 16, DEEP, PARTS, 16, 32), np.uint16)
        y = torch.empty(rows, width)
        x_array, y_array, strips = x.numpy(), y.numpy(), rows // 32
        threads = min(torch.get_num_threads(), strips)

        def run(thread: int) -> None:
            first, last = (32 * (strips * part // threads) for part in (thread, thread + 1))
            product(x_array[first:last], weight, bias, self._left[first // 16 : last // 16], y_array[first:last])

        _each(run, threads)
        return y[:n]

    def _scratch(self, n: int, width: int) -> tuple[np.ndarray, ...]:
        """This thread's room for attention; that of the last shape alone is kept."""
        if getattr(self._local, "shape", None) != (n, width):
            self._local.shape, self._local.scratch = (n, width), attention_scratch(n, width)
        return self._local.scratch


def _matrix(layer: nn.Linear | nn.Conv1d) -> Tensor:
    """The weight as a right-hand matrix, [out, in]; of a convolution [out, 3 * in], filled up with zeros."""
    if isinstance(layer, nn.Linear):
        return layer.weight
    flat = layer.weight.permute(0, 2, 1).flatten(1)
    return F.pad(flat, (0, _to_32(flat.shape[1]) - flat.shape[1]))


def _to_32(n: int) -> int:
    return -(-n // 32) * 32


def _each(run: Callable[[int], None], n: int) -> None:
    """run(0) to run(n - 1), on as many threads as torch may use: the kernels let go of the interpreter."""
    threads = min(torch.get_num_threads(), n)
    if threads == 1:
        for i in range(n):
            run(i)
    else:
        list(_pool(threads).map(run, range(n)))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "amx")

"""The sparse loops of a training step on a CPU, compiled by numba. `sae.sparse` calls them and has their plain twins.

Each works on a range of rows or of latents, lets go of the interpreter, and gives every row and latent the same bits however the ranges are
cut; `spread` shares a range out over as many threads as torch may use.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import torch
from numba import njit

from cache.halves import from_bits

Result = TypeVar("Result")

WORD = 8
"""Flags looked at together."""
NEXT_BOUND, LOWER = np.float32(0.95), np.float32(0.8)
"""Times the k-th largest value of a row: where those of the next row are looked for. Where they are not, times the second, again and again."""
LOWEST_BOUND = np.float32(0.1)
"""The same: below this, any positive value is taken."""
NAN_STAYS = {"reassoc", "contract", "arcp", "nsz"}
"""Sums may be vectorised, but a NaN must come out where one went in: training looks for it in the loss."""
LEAST_SHARE = 256
"""Rows or latents below which a thread of their own costs more than it saves."""


def spread(kernel: Callable[[int, int], Result], n: int) -> list[Result]:
    """`kernel(first, last)` over consecutive parts of range(n), one for each of torch's threads; what each returned, in order."""
    parts = max(1, min(torch.get_num_threads(), n // LEAST_SHARE))
    bounds = [n * part // parts for part in range(parts + 1)]
    if parts == 1:
        return [kernel(0, n)]
    others = [_pool(parts - 1).submit(kernel, first, last) for first, last in pairwise(bounds[1:])]
    return [kernel(bounds[0], bounds[1]), *(other.result() for other in others)]


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "sae-kernel")


# Which values are kept of products plus bias [d_sae]; adding it here saves a pass over them. Results go to `latent` and `value`, row after row,
# latents ascending; `count` gets the number of each row.


@njit(cache=True, nogil=True)
def above(product: Any, bias: Any, bound: Any, first: int, last: int, count: Any, latent: Any, value: Any) -> int:
    """The values greater than bound [d_sae] of rows first to last. Returns how many, or -1 if `latent` and `value` are too short."""
    mask = _mask_for(product)
    n = 0
    for i in range(first, last):
        if n + len(mask) > len(latent):
            return -1
        count[i] = _row_above(product[i], bias, bound, mask, latent, value, n)
        n += count[i]
    return n


@njit(cache=True, nogil=True)
def topk(product: Any, bias: Any, k: int, first: int, last: int, count: Any, latent: Any, value: Any) -> int:
    """The k largest positive values of each of the rows first to last; of equal ones at the cut the first. Returns how many, or -1 if `latent`
    and `value` are too short.

    A row's values are gathered that are greater than a bound, a little below where the last row was cut, in units of the rows' size; where those
    are too few, than lower ones.
    """
    mask = _mask_for(product)
    bound, scratch = np.zeros(len(bias), np.float32), np.empty(len(bias), np.float32)
    n, last_cut = 0, np.float32(0)
    for i in range(first, last):
        if n + len(mask) > len(latent):
            return -1
        size = _size(product[i], bias)
        bound[:] = NEXT_BOUND * last_cut * size
        lowest = LOWEST_BOUND * last_cut * size
        held = _row_above(product[i], bias, bound, mask, latent, value, n)
        while held < k and bound[0] > 0:
            bound[:] = bound[0] * LOWER if bound[0] > lowest else np.float32(0)
            held = _row_above(product[i], bias, bound, mask, latent, value, n)
        last_cut = np.float32(0)
        if held >= k:
            cut = _kth_largest(value[n : n + held], k, scratch)
            held = _keep_largest(latent[n : n + held], value[n : n + held], held, k, cut)
            last_cut = cut / size
        count[i] = held
        n += held
    return n


@njit(cache=True, nogil=True, fastmath=NAN_STAYS)
def _size(row: Any, bias: Any) -> Any:
    """The norm of a row of pre-activations, or 1 where it is 0."""
    squares = np.float32(0)
    for j in range(len(row)):
        pre = row[j] + bias[j]
        squares += pre * pre
    return np.sqrt(squares) if squares > 0 else np.float32(1)


@njit(cache=True, nogil=True)
def _mask_for(product: Any) -> Any:
    """uint8: room for one flag for each column, in whole words, the rest of which stay 0."""
    return np.zeros((product.shape[1] + WORD - 1) // WORD * WORD, np.uint8)


@njit(cache=True, nogil=True)
def _row_above(row: Any, bias: Any, bound: Any, mask: Any, latent: Any, value: Any, n: int) -> int:
    """Puts the values of a row that are greater than their bound at n and after. Returns how many. Writes up to len(mask) places beyond n.

    Flags first, a vector at a time; then only words that have one are looked at.
    """
    for j in range(len(row)):
        mask[j] = row[j] + bias[j] > bound[j]
    words = mask.view(np.uint64)
    at = n
    for word in range(len(words)):
        if words[word]:
            for j in range(word * WORD, min(word * WORD + WORD, len(row))):
                latent[at] = j
                value[at] = row[j] + bias[j]
                at += mask[j]
    return at - n


@njit(cache=True, nogil=True)
def _kth_largest(value: Any, k: int, scratch: Any) -> Any:
    """The k-th largest (Hoare's selection, pivots from the middle). scratch: at least as long, overwritten."""
    low, high = 0, len(value) - 1
    scratch[: len(value)] = value
    while low < high:
        pivot, i, j = scratch[(low + high) // 2], low, high
        while i <= j:
            while scratch[i] > pivot:
                i += 1
            while scratch[j] < pivot:
                j -= 1
            if i <= j:
                scratch[i], scratch[j] = scratch[j], scratch[i]
                i += 1
                j -= 1
        if k - 1 <= j:
            high = j
        elif k - 1 >= i:
            low = i
        else:
            break
    return scratch[k - 1]


@njit(cache=True, nogil=True)
def _keep_largest(latent: Any, value: Any, held: int, k: int, cut: Any) -> int:
    """Moves the k largest, of which `cut` is the smallest, to the front, in order; of those equal to it the first."""
    larger = 0
    for j in range(held):
        larger += value[j] > cut
    equal = k - larger
    n = 0
    for j in range(held):
        if value[j] > cut or (value[j] == cut and equal > 0):
            equal -= value[j] == cut
            latent[n] = latent[j]
            value[n] = value[j]
            n += 1
    return n


@njit(cache=True, nogil=True)
def drop_below(cut: Any, equal: int, start: Any, latent: Any, value: Any, kept_start: Any, kept_latent: Any, kept_value: Any) -> None:
    """Copies the values greater than `cut`, and the first `equal` of those equal to it."""
    n = 0
    kept_start[0] = 0
    for i in range(len(start) - 1):
        for at in range(start[i], start[i + 1]):
            if value[at] > cut or (value[at] == cut and equal > 0):
                equal -= value[at] == cut
                kept_latent[n] = latent[at]
                kept_value[n] = value[at]
                n += 1
        kept_start[i + 1] = n


# Products


@njit(cache=True, nogil=True, fastmath=NAN_STAYS)
def decode_error(
    start: Any,
    latent: Any,
    value: Any,
    W_dec: Any,
    b_dec: Any,
    y: Any,
    bounds: Any,
    weights: Any,
    first: int,
    last: int,
    E: Any,
    error: Any,
    d_value: Any,
) -> None:
    """Rows first to last: what each prefix of the latents leaves of y, and the gradient of the weighted squared errors by value.

    E: [prefixes, rows, d], gets the sums over this and the longer prefixes of weight * (y - y_hat); error: [prefixes, rows], the squared errors;
    d_value: [nnz]. bounds: [prefixes], the end of each, ascending; the last is d_sae.
    """
    d, prefixes = W_dec.shape[1], len(bounds)
    for i in range(first, last):
        rest = E[0, i]
        for c in range(d):
            rest[c] = y[i, c] - b_dec[c]
        at, end = start[i], start[i + 1]
        for g in range(prefixes):
            if g:
                before, rest = rest, E[g, i]
                for c in range(d):
                    rest[c] = before[c]
            stop = at
            while stop < end and latent[stop] < bounds[g]:
                stop += 1
            while at + 4 <= stop:
                v0, v1, v2, v3 = value[at], value[at + 1], value[at + 2], value[at + 3]
                w0, w1, w2, w3 = W_dec[latent[at]], W_dec[latent[at + 1]], W_dec[latent[at + 2]], W_dec[latent[at + 3]]
                for c in range(d):
                    rest[c] -= v0 * w0[c] + v1 * w1[c] + v2 * w2[c] + v3 * w3[c]
                at += 4
            while at < stop:
                v, w = value[at], W_dec[latent[at]]
                for c in range(d):
                    rest[c] -= v * w[c]
                at += 1
            squares = np.float32(0)
            for c in range(d):
                squares += rest[c] * rest[c]
            error[g, i] = squares
        for back in range(prefixes):
            g = prefixes - 1 - back
            rest = E[g, i]
            for c in range(d):
                rest[c] *= weights[g]
            if back:
                longer = E[g + 1, i]
                for c in range(d):
                    rest[c] += longer[c]
        at = start[i]
        for g in range(prefixes):
            rest = E[g, i]
            stop = at
            while stop < end and latent[stop] < bounds[g]:
                stop += 1
            while at + 4 <= stop:
                w0, w1, w2, w3 = W_dec[latent[at]], W_dec[latent[at + 1]], W_dec[latent[at + 2]], W_dec[latent[at + 3]]
                s0, s1, s2, s3 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
                for c in range(d):
                    r = rest[c]
                    s0 += w0[c] * r
                    s1 += w1[c] * r
                    s2 += w2[c] * r
                    s3 += w3[c] * r
                d_value[at], d_value[at + 1], d_value[at + 2], d_value[at + 3] = -2 * s0, -2 * s1, -2 * s2, -2 * s3
                at += 4
            while at < stop:
                w, s = W_dec[latent[at]], np.float32(0)
                for c in range(d):
                    s += w[c] * rest[c]
                d_value[at] = -2 * s
                at += 1


@njit(cache=True, nogil=True)
def transpose(start: Any, latent: Any, by_latent: Any, row: Any, entry: Any) -> None:
    """Entries in the order of latents: by_latent [d_sae + 1] their bounds, the row of each, and where it was. by_latent must be zeros."""
    for at in range(len(latent)):
        by_latent[latent[at] + 1] += 1
    for i in range(1, len(by_latent)):
        by_latent[i] += by_latent[i - 1]
    free = by_latent.copy()
    for i in range(len(start) - 1):
        for at in range(start[i], start[i + 1]):
            to = free[latent[at]]
            free[latent[at]] = to + 1
            row[to] = i
            entry[to] = at


@njit(cache=True, nogil=True, fastmath=NAN_STAYS)
def sum_by_latent(by_latent: Any, row: Any, entry: Any, factor: Any, rows: Any, first: int, last: int, total: Any) -> None:
    """total[l] = sum over the entries of latent l of factor * rows[row], for the latents first to last. factor: [nnz], in the rows' order."""
    d = rows.shape[1]
    for i in range(first, last):
        out = total[i]
        for c in range(d):
            out[c] = 0
        at, end = by_latent[i], by_latent[i + 1]
        while at + 4 <= end:
            f0, f1, f2, f3 = factor[entry[at]], factor[entry[at + 1]], factor[entry[at + 2]], factor[entry[at + 3]]
            r0, r1, r2, r3 = rows[row[at]], rows[row[at + 1]], rows[row[at + 2]], rows[row[at + 3]]
            for c in range(d):
                out[c] += f0 * r0[c] + f1 * r1[c] + f2 * r2[c] + f3 * r3[c]
            at += 4
        while at < end:
            f, r = factor[entry[at]], rows[row[at]]
            for c in range(d):
                out[c] += f * r[c]
            at += 1


# Unit rows


@njit(cache=True, nogil=True, fastmath=NAN_STAYS)
def make_tangent(W: Any, grad: Any, first: int, last: int) -> None:
    """Takes from each row of `grad` its part along the row of W, which has unit norm."""
    d = W.shape[1]
    for i in range(first, last):
        w, g, along = W[i], grad[i], np.float32(0)
        for c in range(d):
            along += w[c] * g[c]
        for c in range(d):
            g[c] -= along * w[c]


@njit(cache=True, nogil=True, fastmath=NAN_STAYS)
def make_unit(W: Any, first: int, last: int) -> None:
    """Divides each row by its norm."""
    d = W.shape[1]
    for i in range(first, last):
        w, squares = W[i], np.float32(0)
        for c in range(d):
            squares += w[c] * w[c]
        factor = np.float32(1) / np.sqrt(squares) if squares > 0 else np.float32(0)
        for c in range(d):
            w[c] *= factor


@njit(cache=True, nogil=True)
def has_not_finite(bits: Any, exponent: Any) -> bool:
    """Whether all bits of `exponent` are set in any of bits [rows, d]."""
    for i in range(len(bits)):
        found = False
        for j in range(bits.shape[1]):
            found |= (bits[i, j] & exponent) == exponent
        if found:
            return True
    return False


@njit(cache=True, nogil=True)
def gather(bits: Any, rows: Any, out: Any) -> None:
    """out [n, d] (float32) = the given rows of bits [rows, d], float16 as uint16 or float32 as uint32."""
    for i in range(len(rows)):
        row, to = bits[rows[i]], out[i]
        for c in range(len(to)):
            to[c] = from_bits(row[c])

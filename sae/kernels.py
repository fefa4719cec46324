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

Result = TypeVar("Result")

BLOCK = 16
"""Values looked at in one comparison: as many as a vector register holds, or few of them."""
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


# Which values are kept. Results go to `latent` and `value`, row after row, latents ascending; `count` gets the number of each row.


@njit(cache=True, nogil=True, fastmath=True)
def above(pre: Any, bound: Any, first: int, last: int, count: Any, latent: Any, value: Any) -> int:
    """The values greater than bound [d_sae] of rows first to last. Returns how many, or -1 if `latent` and `value` are too short."""
    d_sae = pre.shape[1]
    whole = d_sae // BLOCK * BLOCK
    n = 0
    for i in range(first, last):
        if n + d_sae > len(latent):
            return -1
        row, before = pre[i], n
        for block in range(0, whole, BLOCK):
            most = row[block] - bound[block]
            for j in range(block, block + BLOCK):
                beyond = row[j] - bound[j]
                most = beyond if beyond > most else most
            if most > 0:
                for j in range(block, block + BLOCK):
                    latent[n] = j
                    value[n] = row[j]
                    n += row[j] > bound[j]
        for j in range(whole, d_sae):
            latent[n] = j
            value[n] = row[j]
            n += row[j] > bound[j]
        count[i] = n - before
    return n


@njit(cache=True, nogil=True, fastmath=True)
def topk(pre: Any, k: int, first: int, last: int, count: Any, latent: Any, value: Any) -> int:
    """The k largest positive values of each of the rows first to last; of equal ones at the cut the first. Returns how many.

    A row's values are gathered as long as they are greater than a bound, which rises to the k-th largest whenever 2 k are there. It starts
    a little below the last row's; where that is too high, the row is done again from 0.
    """
    d_sae = pre.shape[1]
    whole = d_sae // BLOCK * BLOCK
    room = 2 * k + BLOCK
    some_latent, some_value = np.empty(room, np.int32), np.empty(room, np.float32)
    hint = np.float32(0)
    n = 0
    for i in range(first, last):
        row = pre[i]
        for start in (hint, np.float32(0)):
            bound, held = start, 0
            for block in range(0, whole + BLOCK, BLOCK):
                end = min(block + BLOCK, d_sae)
                if block < whole:
                    most = row[block]
                    for j in range(block, block + BLOCK):
                        most = row[j] if row[j] > most else most
                    if most <= bound:
                        continue
                for j in range(block, end):
                    some_latent[held] = j
                    some_value[held] = row[j]
                    held += row[j] > bound
                if held >= 2 * k:
                    bound = np.partition(some_value[:held], held - k)[held - k]
                    held = _keep_largest(some_latent, some_value, held, k, bound)
            if held >= k or start == 0:
                break
        if held > k:
            held = _keep_largest(some_latent, some_value, held, k, np.partition(some_value[:held], held - k)[held - k])
        smallest = np.float32(np.inf)
        for j in range(held):
            latent[n + j] = some_latent[j]
            value[n + j] = some_value[j]
            smallest = min(smallest, some_value[j])
        hint = np.float32(0.8) * smallest if held == k else np.float32(0)
        count[i] = held
        n += held
    return n


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
) -> None:  # fmt: skip
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

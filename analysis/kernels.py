"""The loops of a scan, compiled by numba: plain, sequential, and therefore the same to the last bit wherever they run.

`tests/analysis/test_kernels.py` holds each of them to a twin in numpy.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from analysis.grid import BINS, FIRST_CODE, MAGNITUDES, MANTISSA_SHIFT

FEATURE_BLOCK = 256
"""Features counted at a time in dense rows, so that their part of the tally stays near (measured: 64 is 1.4, 1536 2.5 times slower)."""

MOMENT = np.dtype([("value", "f4"), ("clip", "i4"), ("frame", "i4")])
"""One activation of a feature; `clip` is -1 and `value` 0 where there is none."""
CANDIDATE = np.dtype([("hash", "u8"), ("cell", "i4"), ("value", "f4"), ("clip", "i4"), ("frame", "i4")])
"""A frame that may be drawn as an example; `cell` is feature * MAGNITUDES + (bin - MAGNITUDES): only positive values are drawn."""


class Tally(NamedTuple):
    """What one block of rows adds up to. The kernels write into it."""

    histogram: np.ndarray
    """int32 [features, BINS + 1]; zeros are counted in the last column, those of sparse rows in none."""
    total: np.ndarray
    """float64 [3, features]: sum of values, of their squares, of positive values."""
    low: np.ndarray
    """float32 [features]: smallest value seen, inf without one."""
    high: np.ndarray
    """float32 [features]: largest value seen, -inf without one."""
    kept: np.ndarray
    """int32 [features, MAGNITUDES]: candidates in each cell."""
    slot_row: np.ndarray
    """int32 [features, MAGNITUDES, per_bin]: their rows, in the order in which rows were visited; beyond `kept` undefined."""
    slot_clip: np.ndarray
    """int32, likewise: their clips."""
    slot_value: np.ndarray
    """float32, likewise: their values."""


def new_tally(features: int, per_bin: int) -> Tally:
    """An empty one."""
    slots = (features, MAGNITUDES, per_bin)
    return Tally(
        np.zeros((features, BINS + 1), np.int32),
        np.zeros((3, features)),
        np.full(features, np.inf, np.float32),
        np.full(features, -np.inf, np.float32),
        np.zeros((features, MAGNITUDES), np.int32),
        np.empty(slots, np.int32),
        np.empty(slots, np.int32),
        np.empty(slots, np.float32),
    )


def tally_dense(values: np.ndarray, order: np.ndarray, clip_of_row: np.ndarray, tally: Tally) -> None:
    """Adds every value to a tally, rows in the given order; each cell keeps its first rows, one per clip.

    values: float32 [rows, features], finite. order: int64 [rows]. clip_of_row: int32 [rows].
    """
    _moments_dense(values, order, tally.total, tally.low, tally.high)
    _cells_dense(values, values.view(np.uint32), order, clip_of_row, tally.histogram, tally.kept, tally.slot_row, tally.slot_clip, tally.slot_value)


def tally_sparse(start: np.ndarray, latent: np.ndarray, value: np.ndarray, order: np.ndarray, clip_of_row: np.ndarray, tally: Tally) -> None:
    """The same for sparse rows: the entries of row i are `start[i]:start[i + 1]` of latent (int32) and value (float32)."""
    _moments_sparse(start, latent, value, order, tally.total, tally.low, tally.high)
    _cells_sparse(
        start, latent, value, value.view(np.uint32), order, clip_of_row,
        tally.histogram, tally.kept, tally.slot_row, tally.slot_clip, tally.slot_value,
    )  # fmt: skip


@njit(cache=True)
def _add(value, feature, total, low, high):
    wide = np.float64(value)
    total[0, feature] += wide
    total[1, feature] += wide * wide
    total[2, feature] += max(wide, 0.0)
    low[feature] = min(low[feature], value)
    high[feature] = max(high[feature], value)


@njit(cache=True)
def _moments_dense(values, order, total, low, high):
    for i in range(len(order)):
        for feature in range(values.shape[1]):
            _add(values[order[i], feature], feature, total, low, high)


@njit(cache=True)
def _moments_sparse(start, latent, value, order, total, low, high):
    for i in range(len(order)):
        for entry in range(start[order[i]], start[order[i] + 1]):
            _add(value[entry], latent[entry], total, low, high)


@njit(cache=True)
def _bin(bits):
    """The bin of a float32's bits; BINS for zero."""
    magnitude: Any = np.int64(bits & np.uint32(0x7FFFFFFF))
    m = min(max((magnitude >> MANTISSA_SHIFT) - FIRST_CODE, 0), MAGNITUDES - 1)
    signed = MAGNITUDES - 1 - m if bits >> np.uint32(31) else MAGNITUDES + m
    return BINS if magnitude == 0 else signed


@njit(cache=True)
def _keep(feature, m, value, row, clip, kept, slot_row, slot_clip, slot_value):
    n = kept[feature, m]
    if n == slot_row.shape[2]:
        return
    for i in range(n):
        if slot_clip[feature, m, i] == clip:
            return
    slot_row[feature, m, n] = row
    slot_clip[feature, m, n] = clip
    slot_value[feature, m, n] = value
    kept[feature, m] = n + 1


@njit(cache=True)
def _cells_dense(values, bits, order, clip_of_row, histogram, kept, slot_row, slot_clip, slot_value):
    rows, features = values.shape
    for first in range(0, features, FEATURE_BLOCK):
        last = min(first + FEATURE_BLOCK, features)
        for i in range(rows):
            row = order[i]
            clip = clip_of_row[row]
            for feature in range(first, last):
                b = _bin(bits[row, feature])
                histogram[feature, b] += 1
                if MAGNITUDES <= b < BINS:
                    _keep(feature, b - MAGNITUDES, values[row, feature], row, clip, kept, slot_row, slot_clip, slot_value)


@njit(cache=True)
def _cells_sparse(start, latent, value, bits, order, clip_of_row, histogram, kept, slot_row, slot_clip, slot_value):
    for i in range(len(order)):
        row = order[i]
        clip = clip_of_row[row]
        for entry in range(start[row], start[row + 1]):
            b = _bin(bits[entry])
            histogram[latent[entry], b] += 1
            if MAGNITUDES <= b < BINS:
                _keep(latent[entry], b - MAGNITUDES, value[entry], row, clip, kept, slot_row, slot_clip, slot_value)


@njit(cache=True)
def _insert(top, feature, value, clip, frame):
    """Clips come in ascending order, so of equal values the one that is there already goes first."""
    j = top.shape[1] - 1
    if not value > top[feature, j].value:
        return
    while j > 0 and top[feature, j - 1].value < value:
        top[feature, j] = top[feature, j - 1]
        j -= 1
    top[feature, j].value = value
    top[feature, j].clip = clip
    top[feature, j].frame = frame


@njit(cache=True)
def top_dense(values, first_row, clips, top):
    """Inserts each clip's first largest value of every feature, where positive, into `top` [features, k] of MOMENT, best first.

    values: float32 [rows, features]. first_row: int64 [clips + 1]. clips: int32 [clips], ascending.
    """
    features = values.shape[1]
    best = np.empty(features, np.float32)
    frame = np.empty(features, np.int32)
    for c in range(len(clips)):
        best[:] = 0
        for row in range(first_row[c], first_row[c + 1]):
            for feature in range(features):
                if values[row, feature] > best[feature]:
                    best[feature] = values[row, feature]
                    frame[feature] = row - first_row[c]
        for feature in range(features):
            _insert(top, feature, best[feature], clips[c], frame[feature])


@njit(cache=True)
def top_sparse(start, latent, value, first_row, clips, top):
    """The same for sparse rows."""
    features = top.shape[0]
    best = np.zeros(features, np.float32)
    frame = np.zeros(features, np.int32)
    seen = np.empty(features, np.int32)
    for c in range(len(clips)):
        n = 0
        for row in range(first_row[c], first_row[c + 1]):
            for entry in range(start[row], start[row + 1]):
                feature = latent[entry]
                if value[entry] > best[feature]:
                    if best[feature] == 0:
                        seen[n] = feature
                        n += 1
                    best[feature] = value[entry]
                    frame[feature] = row - first_row[c]
        for i in range(n):
            _insert(top, seen[i], best[seen[i]], clips[c], frame[seen[i]])
            best[seen[i]] = 0


@njit(cache=True)
def _before(a, b):
    if a.cell != b.cell:
        return a.cell < b.cell
    if a.hash != b.hash:
        return a.hash < b.hash
    return a.clip < b.clip


@njit(cache=True)
def merge_candidates(a, b, per_bin):
    """Merges two arrays of CANDIDATE, each sorted by (cell, hash, clip), and keeps the first `per_bin` of every cell. No clip is in both."""
    merged = np.empty(len(a) + len(b), a.dtype)
    i, j, n, in_cell = 0, 0, 0, 0
    while i < len(a) or j < len(b):
        if j == len(b) or (i < len(a) and _before(a[i], b[j])):
            merged[n] = a[i]
            i += 1
        else:
            merged[n] = b[j]
            j += 1
        in_cell = in_cell + 1 if n > 0 and merged[n - 1].cell == merged[n].cell else 1
        if in_cell <= per_bin:
            n += 1
    return merged[:n]


@njit(cache=True)
def draw(bins, clips, n_bins, per_bin):
    """Of frames in hash order takes the first `per_bin` of every bin, one per clip: indices, int64 [n_bins, per_bin], -1 where there is none."""
    taken = np.full((n_bins, per_bin), -1, np.int64)
    n_taken = np.zeros(n_bins, np.int64)
    for i in range(len(bins)):
        b = bins[i]
        fresh = n_taken[b] < per_bin
        for j in range(n_taken[b]):
            fresh = fresh and clips[taken[b, j]] != clips[i]
        if fresh:
            taken[b, n_taken[b]] = i
            n_taken[b] += 1
    return taken

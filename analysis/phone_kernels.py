"""The loops that count phones by activation, compiled by numba. `tests/analysis/test_evidence_counts.py` holds each to a plain twin.

Values are counted on the scan's grid (`analysis.grid`) with fewer bins an octave, ascending in value, zero a bin of its own.
"""

from typing import Any

import numpy as np
from numba import njit

from analysis.grid import HIGHEST_OCTAVE, LOWEST_OCTAVE
from analysis.kernels import by_feature
from analysis.phone_labels import FRAME_US

SUB_BINS = 4
"""Bins per octave. docs/phones.md has the AUC's error for 2, 4 and 8."""
MAGNITUDES = (HIGHEST_OCTAVE - LOWEST_OCTAVE) * SUB_BINS + 1
"""Bins of one sign."""
ZERO = MAGNITUDES
"""The bin of zero: negative ones lie below, positive ones above."""
BINS = 2 * MAGNITUDES + 1
MANTISSA_SHIFT = 23 - SUB_BINS.bit_length() + 1
"""What remains of a float32's magnitude after this shift is its exponent and the first bits of its mantissa: octave and sub-bin."""
FIRST_CODE = (127 + LOWEST_OCTAVE) * SUB_BINS - 1
"""Exponent-and-sub-bin code of the bin next to zero; 127 is float32's exponent bias."""
FEATURE_BLOCK = 32
"""Features counted at a time in dense rows: two cache lines of a row, and their part of the table stays in the second-level cache."""

RANGES = 10
"""Equally wide ranges from 0 to a feature's maximum."""
WINDOW_US = (-100_000, 200_000)
"""Around the start of a phone: where its onset is looked for."""
LATENCY_US = 5_000
"""Width of a bin of onset latency: half of what aligners resolve."""
LATENCIES = (WINDOW_US[1] - WINDOW_US[0]) // LATENCY_US
ALL, PHONE, CLASS = 0, 1, 2
"""Histograms of a feature: of all labelled frames, of those of its phone, of those of its class."""
DETECTED, HITS, NEAR_HITS, FOUND = 0, 1, 2, 3
"""Frames at or above a feature's threshold; of these, those in its phone, and those within a frame of it; frames of its phone within a frame
of any that is at or above the threshold."""
TOP, LOWER = 0, 1


def bin_of(values: np.ndarray) -> np.ndarray:
    """float32 -> int64 bin in [0, BINS). The plain twin of what the kernels do value by value."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.int64)
    magnitude = np.clip(((bits & 0x7FFFFFFF) >> MANTISSA_SHIFT) - FIRST_CODE, 0, MAGNITUDES - 1)
    signed = np.where(bits >> 31 == 0, ZERO + 1 + magnitude, ZERO - 1 - magnitude)
    return np.where(bits & 0x7FFFFFFF == 0, ZERO, signed)


def bin_lo_hi() -> tuple[np.ndarray, np.ndarray]:
    """float64 [BINS] each: between which values a bin lies; 0 and 0 for ZERO."""
    octaves = np.ldexp(1.0, np.arange(LOWEST_OCTAVE, HIGHEST_OCTAVE))[:, None]
    inner = (octaves * (1 + np.arange(SUB_BINS) / SUB_BINS)).ravel()
    lower, upper = np.append(0.0, inner), np.append(inner, np.ldexp(1.0, HIGHEST_OCTAVE))
    return np.concatenate([-upper[::-1], [0.0], lower]), np.concatenate([-lower[::-1], [0.0], upper])


@njit(cache=True)
def _bin(bits):
    magnitude: Any = np.int64(bits & np.uint32(0x7FFFFFFF))
    m = min(max((magnitude >> MANTISSA_SHIFT) - FIRST_CODE, 0), MAGNITUDES - 1)
    signed = ZERO - 1 - m if bits >> np.uint32(31) else ZERO + 1 + m
    return ZERO if magnitude == 0 else signed


@njit(cache=True)
def count_dense(bits, label, shuffled, counts, shuffled_counts):
    """Adds every frame to `counts` [features, BINS, phones + 1], and the same by shuffled label; frames without label to the last phone.

    bits: uint32 [rows, features]. Phones lie innermost because a feature's values fill few bins: what is written to lies together.
    """
    rows, features = bits.shape
    unlabelled = counts.shape[2] - 1
    for first in range(0, features, FEATURE_BLOCK):
        last = min(first + FEATURE_BLOCK, features)
        for row in range(rows):
            p = label[row] if label[row] >= 0 else unlabelled
            s = shuffled[row] if shuffled[row] >= 0 else unlabelled
            for feature in range(first, last):
                b = _bin(bits[row, feature])
                counts[feature, b, p] += 1
                shuffled_counts[feature, b, s] += 1


@njit(cache=True)
def sparse_cells(start, latent, bits, label, n_phones):
    """The cell (feature * phones + phone) * BINS + bin of every entry of a labelled row, int64, in no useful order."""
    cells = np.empty(len(latent), np.int64)
    n = 0
    for row in range(len(label)):
        if label[row] < 0:
            continue
        for entry in range(start[row], start[row + 1]):
            b = _bin(bits[entry])
            if b != ZERO:
                cells[n] = (np.int64(latent[entry]) * n_phones + label[row]) * BINS + b
                n += 1
    return cells[:n]


@njit(cache=True)
def merge_cells(a, a_count, b, b_count):
    """Two ascending lists of cells as one, counts of cells that are in both added."""
    cells = np.empty(len(a) + len(b), np.int64)
    counts = np.empty(len(a) + len(b), np.int64)
    i, j, n = 0, 0, 0
    while i < len(a) or j < len(b):
        take_a = i < len(a) and (j == len(b) or a[i] <= b[j])
        take_b = j < len(b) and (i == len(a) or b[j] <= a[i])
        cells[n] = a[i] if take_a else b[j]
        counts[n] = (a_count[i] if take_a else 0) + (b_count[j] if take_b else 0)
        i += take_a
        j += take_b
        n += 1
    return cells[:n], counts[:n]


# The second pass


@njit(cache=True)
def _range_of(value, high):
    """Which range [high * i / RANGES, high * (i + 1) / RANGES) a positive value is in; the last one includes `high`."""
    r: Any = min(np.int64(min(value / high, 1.0) * RANGES), RANGES - 1)
    while r + 1 < RANGES and value >= high * (r + 1) / RANGES:
        r += 1
    while r > 0 and value < high * r / RANGES:
        r -= 1
    return r


@njit(cache=True)
def _detail_column(
    column, bits, first_row, label, group, occurrence, occurrence_clip, occurrence_us,
    phone, member, threshold, high, top_from, lower_from, first_bin, histogram, detected, latency, ranges, strata,
):  # fmt: skip
    """One feature's values in all rows of a block. phone: its own. member: bool [phones], those of its class."""
    for c in range(len(first_row) - 1):
        g, first, stop = group[c], first_row[c], first_row[c + 1]
        for row in range(first, stop):
            value, p = column[row], label[row]
            if p != phone and (value == 0 or p < 0):
                continue
            before, after = row > first, row + 1 < stop
            if p == phone and (
                value >= threshold or (before and column[row - 1] >= threshold) or (after and column[row + 1] >= threshold)
            ):  # fmt: skip
                detected[g, FOUND] += 1
            if value == 0:
                continue
            b = _bin(bits[row]) - first_bin
            if b < 0 or b >= histogram.shape[2]:
                continue  # other rows than the first pass saw: `evidence.measure` refuses what comes of them
            histogram[g, ALL, b] += 1
            if p == phone:
                histogram[g, PHONE, b] += 1
            if member[p]:
                histogram[g, CLASS, b] += 1
            if value < 0:
                continue
            wide = np.float64(value)
            ranges[_range_of(wide, high), p] += 1
            near = p == phone or (before and label[row - 1] == phone) or (after and label[row + 1] == phone)
            if value >= threshold:
                detected[g, DETECTED] += 1
                detected[g, HITS] += p == phone
                detected[g, NEAR_HITS] += near
            if wide >= lower_from:
                strata[g, TOP if wide >= top_from else LOWER, phone if near else p] += 1
    for i in range(occurrence[phone], occurrence[phone + 1]):
        c, begin = occurrence_clip[i], occurrence_us[i]
        n = first_row[c + 1] - first_row[c]
        frame = max(0, -((FRAME_US // 2 - begin - WINDOW_US[0]) // FRAME_US))
        while frame < n and FRAME_US * frame + FRAME_US // 2 < begin + WINDOW_US[1]:
            if column[first_row[c] + frame] >= threshold:
                latency[group[c], (FRAME_US * frame + FRAME_US // 2 - begin - WINDOW_US[0]) // LATENCY_US] += 1
                break
            frame += 1


@njit(cache=True)
def detail_dense(
    values, first_row, label, group, occurrence, occurrence_clip, occurrence_us,
    phone, class_of, members, threshold, high, top_from, lower_from, first_bin, n_bins, offset,
    histogram, detected, latency, ranges, strata,
):  # fmt: skip
    """Adds a block of dense rows to what the second pass counts; see `analysis.phone_details`."""
    rows, features = values.shape
    columns = np.empty((FEATURE_BLOCK, rows), np.float32)
    groups = detected.shape[1]
    for first in range(0, features, FEATURE_BLOCK):
        last = min(first + FEATURE_BLOCK, features)
        for row in range(rows):
            for feature in range(first, last):
                columns[feature - first, row] = values[row, feature]
        for f in range(first, last):
            if phone[f] < 0:
                continue
            own = histogram[offset[f] : offset[f + 1]].reshape(groups, 3, n_bins[f])
            column = columns[f - first]
            _detail_column(
                column, column.view(np.uint32), first_row, label, group, occurrence, occurrence_clip, occurrence_us,
                phone[f], members[class_of[f]], threshold[f], high[f], top_from[f], lower_from[f], first_bin[f],
                own, detected[f], latency[f], ranges[f], strata[f],
            )  # fmt: skip


@njit(cache=True)
def detail_sparse(
    start, latent, value, first_row, label, group, occurrence, occurrence_clip, occurrence_us,
    phone, class_of, members, threshold, high, top_from, lower_from, first_bin, n_bins, offset,
    histogram, detected, latency, ranges, strata,
):  # fmt: skip
    """The same for sparse rows. A feature without an entry in the block adds nothing."""
    features, rows = len(phone), len(label)
    groups = detected.shape[1]
    begin, row_of, value_of = by_feature(start, latent, value, features)
    column = np.zeros(rows, np.float32)
    for f in range(features):
        if phone[f] < 0 or begin[f] == begin[f + 1]:
            continue
        for at in range(begin[f], begin[f + 1]):
            column[row_of[at]] = value_of[at]
        own = histogram[offset[f] : offset[f + 1]].reshape(groups, 3, n_bins[f])
        _detail_column(
            column, column.view(np.uint32), first_row, label, group, occurrence, occurrence_clip, occurrence_us,
            phone[f], members[class_of[f]], threshold[f], high[f], top_from[f], lower_from[f], first_bin[f],
            own, detected[f], latency[f], ranges[f], strata[f],
        )  # fmt: skip
        for at in range(begin[f], begin[f + 1]):
            column[row_of[at]] = 0


@njit(cache=True)
def count_labels(first_row, label, group, frames, near_frames):
    """Adds to `frames` [groups, phones], and to `near_frames` [groups, phones, phones]: row q has the frames within one of q counted as q's."""
    for c in range(len(first_row) - 1):
        first, stop = first_row[c], first_row[c + 1]
        for row in range(first, stop):
            p = label[row]
            if p < 0:
                continue
            frames[group[c], p] += 1
            before = label[row - 1] if row > first else p
            after = label[row + 1] if row + 1 < stop else p
            for q in range(frames.shape[1]):
                near_frames[group[c], q, q if q in (before, after) else p] += 1

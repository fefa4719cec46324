"""The loops of a scan, compiled by numba: plain, sequential, and therefore the same to the last bit wherever they run.

A block of rows is looked at feature by feature, a feature's values in the order of the rows: all that is kept of a feature meanwhile (its
histogram, its candidates, the clip's strongest value, the stretch that is going on) then stays in the nearest cache. Sparse rows are sorted by
feature first; of dense rows some columns at a time are copied aside. `tests/analysis/test_kernels.py` holds each loop to a plain twin.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from analysis.grid import BINS, FIRST_CODE, MAGNITUDES, MANTISSA_SHIFT

TILE = 32
"""Columns of dense rows that are copied aside together: two cache lines of every row."""
TILE_ROWS = 32
"""Rows of a tile that are copied together."""
COMPARE = {"nnan", "nsz"}
"""Values are finite, and a zero's sign says nothing: this lets comparisons be made many at a time. Sums keep their order."""
SIGN = 0x80000000
"""The sign bit of a float32."""
LONGEST_RUN = 1 << 16
"""More frames than any clip has: a run's key is feature * LONGEST_RUN + its length."""

MOMENT = np.dtype([("value", "f4"), ("clip", "i4"), ("frame", "i4"), ("speaker", "i4")])
"""One activation of a feature; `clip` is -1 and `value` 0 where there is none. `speaker`: equal for clips of the same speaker."""
CANDIDATE = np.dtype([("hash", "u8"), ("cell", "i4"), ("value", "f4"), ("clip", "i4"), ("frame", "i4")])
"""A frame that may be drawn as an example; `cell` is feature * MAGNITUDES + (bin - MAGNITUDES): only positive values are drawn."""


class Rows(NamedTuple):
    """Where the n rows of a block, whole clips in address order, come from."""

    first_row: np.ndarray
    """int64 [clips + 1]: clip i has the rows `first_row[i]:first_row[i + 1]`."""
    clip: np.ndarray
    """int32 [clips]: its number, ascending."""
    speaker: np.ndarray
    """int32 [clips]: its speaker's number."""
    clip_of_row: np.ndarray
    """int32 [n]: index into `clip`."""
    hash: np.ndarray
    """uint64 [n]"""
    rank: np.ndarray
    """int32 [n]: the row's place in the order of hashes."""


class Tally(NamedTuple):
    """What a block adds up to, feature by feature."""

    total: np.ndarray
    """float64 [3, features]: sum of values, of their squares, of positive values."""
    low: np.ndarray
    """float32 [features]: smallest value seen, inf without one. Sparse rows show no zeros."""
    high: np.ndarray
    """float32 [features]: largest value seen, -inf without one."""
    nonzero: np.ndarray
    """int64 [features]: how many values are not zero."""
    rise: np.ndarray
    """int64 [features]: frames from the first of a run to its first largest value, summed over runs."""
    fall: np.ndarray
    """int64 [features]: frames from there to its last."""
    top: np.ndarray
    """MOMENT [features, k]: largest positive values, best first; see `insert`."""
    bottom: np.ndarray
    """MOMENT [features, k]: the same of the negated values."""


class Found(NamedTuple):
    """What a block holds, as ascending lists; counts are int64."""

    bins: np.ndarray
    """int64: feature * BINS + bin, for the bins that hold anything. Zeros are in none."""
    bin_counts: np.ndarray
    runs: np.ndarray
    """int64: feature * LONGEST_RUN + length, of maximal stretches of consecutive frames > 0 within a clip."""
    run_counts: np.ndarray
    candidates: np.ndarray
    """CANDIDATE, by (cell, hash, clip): of every cell the `per_bin` frames of lowest hash, one per clip."""


class _Scratch(NamedTuple):
    """What is kept of one feature while its values pass. All zero between features, but for what `kept` says is not there."""

    histogram: np.ndarray
    """int64 [BINS + 1]; the last one is for zeros and is not kept."""
    kept: np.ndarray
    """int32 [MAGNITUDES]: candidates of each cell."""
    slot_rank: np.ndarray
    """int32 [MAGNITUDES, per_bin]: their rows' ranks, ascending."""
    slot_entry: np.ndarray
    """int32, likewise: where their values are."""
    run_lengths: np.ndarray
    """int64 [frames of the longest clip + 1]"""
    ends: np.ndarray
    """int64 [3]: first and last bin that holds anything, longest run."""


def new_tally(features: int, k: int) -> Tally:
    """An empty one."""
    low, high = np.full(features, np.inf, np.float32), np.full(features, -np.inf, np.float32)
    nonzero, rise, fall = np.zeros((3, features), np.int64)
    return Tally(np.zeros((3, features)), low, high, nonzero, rise, fall, no_moments(features, k), no_moments(features, k))


def no_moments(features: int, k: int) -> np.ndarray:
    """MOMENT [features, k], all absent."""
    moments = np.zeros((features, k), MOMENT)
    moments["clip"] = -1
    return moments


def tally_sparse(start: np.ndarray, latent: np.ndarray, value: np.ndarray, rows: Rows, per_bin: int, per_speaker: int, tally: Tally) -> Found:
    """Adds sparse rows to a tally: the entries of row i are `start[i]:start[i + 1]` of latent (int32) and value (float32, not zero).

    per_bin: candidates of a cell. per_speaker: see `insert`.
    """
    first, row, column_value = by_feature(start, latent, value, len(tally.low))
    return Found(*_tally_columns(first, row, column_value, rows, per_bin, per_speaker, tally))


def tally_dense(values: np.ndarray, rows: Rows, per_bin: int, per_speaker: int, tally: Tally) -> Found:
    """The same for dense rows, float32 [n, features], finite."""
    return Found(*_tally_tiles(values, rows, per_bin, per_speaker, tally))


@njit(cache=True)
def by_feature(start, latent, value, features):
    """Sparse rows -> sparse columns: the entries of feature f are `first[f]:first[f + 1]` of row (int32, ascending) and value."""
    first = np.zeros(features + 1, np.int64)
    for entry in range(len(latent)):
        first[latent[entry] + 1] += 1
    for feature in range(features):
        first[feature + 1] += first[feature]
    at = first[:-1].copy()
    row, column_value = np.empty(len(latent), np.int32), np.empty(len(latent), np.float32)
    for i in range(len(start) - 1):
        for entry in range(start[i], start[i + 1]):
            to = at[latent[entry]]
            row[to] = i
            column_value[to] = value[entry]
            at[latent[entry]] = to + 1
    return first, row, column_value


@njit(cache=True)
def _scratch(rows, per_bin):
    longest = 0
    for i in range(len(rows.clip)):
        longest = max(longest, rows.first_row[i + 1] - rows.first_row[i])
    slots = (MAGNITUDES, per_bin)
    counts, kept, run_lengths = np.zeros(BINS + 1, np.int64), np.zeros(MAGNITUDES, np.int32), np.zeros(longest + 1, np.int64)
    return _Scratch(counts, kept, np.empty(slots, np.int32), np.empty(slots, np.int32), run_lengths, np.array([BINS, -1, 0]))


@njit(cache=True)
def _lists(room):
    """Of keys and counts, twice, and of candidates, as `Found` has them."""
    return np.empty(room, np.int64), np.empty(room, np.int64), np.empty(room, np.int64), np.empty(room, np.int64), np.empty(room, CANDIDATE)


@njit(cache=True)
def _with_room(items, used, more):
    """The same array, or a larger copy of its `used` first items."""
    if used + more <= len(items):
        return items
    larger = np.empty(2 * (used + more), items.dtype)
    larger[:used] = items[:used]
    return larger


@njit(cache=True)
def _tally_columns(first, row, value, rows, per_bin, per_speaker, tally):
    scratch = _scratch(rows, per_bin)
    bins, bin_counts, runs, run_counts, candidates = _lists(len(value))
    n_bins, n_runs, n_candidates = 0, 0, 0
    for feature in range(len(first) - 1):
        a, b = first[feature], first[feature + 1]
        _moments(feature, row[a:b], value[a:b], rows, per_speaker, scratch, tally)
        _positives(feature, row[a:b], value[a:b], rows, scratch, tally)
        n_candidates = _take_candidates(feature, row[a:b], value[a:b], rows, scratch, candidates, n_candidates)
        n_bins, n_runs = _take_counts(feature, scratch, bins, bin_counts, n_bins, runs, run_counts, n_runs)
    return bins[:n_bins], bin_counts[:n_bins], runs[:n_runs], run_counts[:n_runs], candidates[:n_candidates]


@njit(cache=True)
def _tally_tiles(values, rows, per_bin, per_speaker, tally):
    n, features = values.shape
    scratch = _scratch(rows, per_bin)
    bins, bin_counts, runs, run_counts, candidates = _lists(features * BINS // 4)
    n_bins, n_runs, n_candidates = 0, 0, 0
    tile = np.empty((TILE, n + TILE), np.float32)  # columns a power of two apart would contend for the same places of the cache
    row, value = np.empty(n + 1, np.int32), np.empty(n + 1, np.float32)
    _moments_of_rows(values, tally.total, tally.low, tally.high)
    for start in range(0, features, TILE):
        stop = min(start + TILE, features)
        _copy_tile(values, start, stop, tile)
        for feature in range(start, stop):
            column = tile[feature - start, :n]
            _count_bins(column, scratch)
            tally.nonzero[feature] += n - scratch.histogram[BINS]
            scratch.histogram[BINS] = 0
            _extremes(feature, column, rows, per_speaker, tally)
            n_positive = 0
            for i in range(n):  # without a branch: which values are positive is hard to foresee
                row[n_positive] = i
                value[n_positive] = column[i]
                n_positive += column[i] > 0
            _positives(feature, row[:n_positive], value[:n_positive], rows, scratch, tally)

            bins, bin_counts = _with_room(bins, n_bins, BINS), _with_room(bin_counts, n_bins, BINS)
            longest = len(scratch.run_lengths)
            runs, run_counts = _with_room(runs, n_runs, longest), _with_room(run_counts, n_runs, longest)
            candidates = _with_room(candidates, n_candidates, MAGNITUDES * per_bin)
            n_candidates = _take_candidates(feature, row, value, rows, scratch, candidates, n_candidates)
            n_bins, n_runs = _take_counts(feature, scratch, bins, bin_counts, n_bins, runs, run_counts, n_runs)
    return bins[:n_bins], bin_counts[:n_bins], runs[:n_runs], run_counts[:n_runs], candidates[:n_candidates]


@njit(cache=True)
def _bin(bits):
    """The bin of a float32's bits; BINS for zero."""
    magnitude: Any = np.int64(bits & np.uint32(0x7FFFFFFF))
    m = min(max((magnitude >> MANTISSA_SHIFT) - FIRST_CODE, 0), MAGNITUDES - 1)
    signed = MAGNITUDES - 1 - m if bits >> np.uint32(31) else MAGNITUDES + m
    return BINS if magnitude == 0 else signed


# Of dense columns


@njit(cache=True, fastmath=COMPARE)
def _moments_of_rows(values, total, low, high):
    """Features side by side, many at a time; each one's sums in the order of the rows."""
    sums, squares, positive = total
    for i in range(len(values)):
        row = values[i]
        for feature in range(len(row)):
            v = row[feature]
            wide = np.float64(v)
            sums[feature] += wide
            squares[feature] += wide * wide
            positive[feature] += wide if wide > 0 else 0.0
            low[feature] = v if v < low[feature] else low[feature]
            high[feature] = v if v > high[feature] else high[feature]


@njit(cache=True)
def _copy_tile(values, start, stop, tile):
    for first in range(0, len(values), TILE_ROWS):
        for feature in range(start, stop):
            for i in range(first, min(first + TILE_ROWS, len(values))):
                tile[feature - start, i] = values[i, feature]


@njit(cache=True)
def _count_bins(column, scratch):
    bits = column.view(np.uint32)
    for i in range(len(column)):
        scratch.histogram[_bin(bits[i])] += 1
    scratch.ends[0], scratch.ends[1] = 0, BINS - 1


@njit(cache=True)
def _extremes(feature, column, rows, per_speaker, tally):
    """Where in the clip its strongest value is matters only if it is among the best."""
    bits, signed_bits = column.view(np.uint32), column.view(np.int32)
    found = np.empty(2, np.uint32)
    strongest = found.view(np.float32)
    for clip in range(len(rows.clip)):
        first, stop = rows.first_row[clip], rows.first_row[clip + 1]
        # As signed integers positive values order as they do, above all others; as unsigned ones so do negative ones. Integers are compared
        # many at a time.
        largest, most_negative = np.int32(0), np.uint32(SIGN)
        for i in range(first, stop):
            largest = max(largest, signed_bits[i])
        for i in range(first, stop):
            most_negative = max(most_negative, bits[i])
        found[0], found[1] = largest, most_negative
        best, worst = strongest[0], strongest[1]
        if best > tally.top[feature, -1].value:
            insert(tally.top[feature], best, rows.clip[clip], _first_of(best, column[first:stop]), rows.speaker[clip], per_speaker)
        if -worst > tally.bottom[feature, -1].value:
            insert(tally.bottom[feature], -worst, rows.clip[clip], _first_of(worst, column[first:stop]), rows.speaker[clip], per_speaker)


@njit(cache=True)
def _first_of(value, values):
    i = 0
    while values[i] != value:
        i += 1
    return i


# Of sparse columns


@njit(cache=True)
def _moments(feature, row, value, rows, per_speaker, scratch, tally):
    """Everything but what concerns positive values alone, of one feature's values, which are not zero, in the order of their rows."""
    total, squares, positive = 0.0, 0.0, 0.0
    low, high = np.float32(np.inf), np.float32(-np.inf)
    bits = value.view(np.uint32)
    first_bin, last_bin = BINS, -1
    clip, end, best, worst, best_row, worst_row = -1, -1, np.float32(0), np.float32(0), 0, 0
    for entry in range(len(value)):
        v, at = value[entry], row[entry]
        if at >= end:
            if clip >= 0:
                _insert_clip(feature, clip, best, best_row, worst, worst_row, rows, per_speaker, tally)
            clip = rows.clip_of_row[at]
            end, best, worst = rows.first_row[clip + 1], np.float32(0), np.float32(0)
        wide = np.float64(v)
        total += wide
        squares += wide * wide
        positive += max(wide, 0.0)
        low, high = min(low, v), max(high, v)
        b = _bin(bits[entry])
        scratch.histogram[b] += 1
        first_bin, last_bin = min(first_bin, b), max(last_bin, b)
        if v > best:
            best, best_row = v, at
        if v < worst:
            worst, worst_row = v, at
    if clip >= 0:
        _insert_clip(feature, clip, best, best_row, worst, worst_row, rows, per_speaker, tally)
    scratch.ends[0], scratch.ends[1] = first_bin, last_bin
    tally.nonzero[feature] += len(value)
    tally.total[0, feature] += total
    tally.total[1, feature] += squares
    tally.total[2, feature] += positive
    tally.low[feature] = min(tally.low[feature], low)
    tally.high[feature] = max(tally.high[feature], high)


@njit(cache=True)
def _insert_clip(feature, clip, best, best_row, worst, worst_row, rows, per_speaker, tally):
    first = rows.first_row[clip]
    insert(tally.top[feature], best, rows.clip[clip], best_row - first, rows.speaker[clip], per_speaker)
    insert(tally.bottom[feature], -worst, rows.clip[clip], worst_row - first, rows.speaker[clip], per_speaker)


# Of both


@njit(cache=True)
def _positives(feature, row, value, rows, scratch, tally):
    """Runs and candidates of one feature's values, in the order of their rows; those that are not positive are passed over."""
    bits = value.view(np.uint32)
    rise, fall, longest, end = 0, 0, 0, -1
    run_first, run_last, peak_row, peak = -1, -2, -1, np.float32(0)  # of the stretch that is going on
    for entry in range(len(value)):
        v, at = value[entry], row[entry]
        if not v > 0:
            continue
        if at != run_last + 1 or at >= end:
            if run_first >= 0:
                scratch.run_lengths[run_last - run_first + 1] += 1
                longest = max(longest, run_last - run_first + 1)
                rise += peak_row - run_first
                fall += run_last - peak_row
            end = rows.first_row[rows.clip_of_row[at] + 1]
            run_first, peak = at, np.float32(0)
        run_last = at
        if v > peak:
            peak, peak_row = v, at
        m = _bin(bits[entry]) - MAGNITUDES
        kept = scratch.kept[m]
        if kept < scratch.slot_rank.shape[1] or rows.rank[at] < scratch.slot_rank[m, kept - 1]:
            _keep(m, entry, row, rows, scratch)
    if run_first >= 0:
        scratch.run_lengths[run_last - run_first + 1] += 1
        longest = max(longest, run_last - run_first + 1)
        rise += peak_row - run_first
        fall += run_last - peak_row
    scratch.ends[2] = longest
    tally.rise[feature] += rise
    tally.fall[feature] += fall


@njit(cache=True)
def _keep(m, entry, row, rows, scratch):
    """Puts a frame among the `per_bin` of lowest rank of its cell, one per clip. A frame that had to go never comes back into its own: there
    are `per_bin` other clips with lower ranks."""
    at = row[entry]
    rank, clip, kept = rows.rank[at], rows.clip_of_row[at], scratch.kept[m]
    place = 0
    while place < kept and rows.clip_of_row[row[scratch.slot_entry[m, place]]] != clip:
        place += 1
    if place < kept:
        if scratch.slot_rank[m, place] < rank:
            return
    elif kept < scratch.slot_rank.shape[1]:
        scratch.kept[m] = kept + 1
    else:
        place = kept - 1
    while place > 0 and scratch.slot_rank[m, place - 1] > rank:
        scratch.slot_rank[m, place] = scratch.slot_rank[m, place - 1]
        scratch.slot_entry[m, place] = scratch.slot_entry[m, place - 1]
        place -= 1
    scratch.slot_rank[m, place] = rank
    scratch.slot_entry[m, place] = entry


@njit(cache=True)
def _take_candidates(feature, row, value, rows, scratch, candidates, n):
    for m in range(max(scratch.ends[0] - MAGNITUDES, 0), scratch.ends[1] - MAGNITUDES + 1):
        for i in range(scratch.kept[m]):
            entry = scratch.slot_entry[m, i]
            at = row[entry]
            clip = rows.clip_of_row[at]
            candidates[n].hash = rows.hash[at]
            candidates[n].cell = feature * MAGNITUDES + m
            candidates[n].value = value[entry]
            candidates[n].clip = rows.clip[clip]
            candidates[n].frame = at - rows.first_row[clip]
            n += 1
        scratch.kept[m] = 0
    return n


@njit(cache=True)
def _take_counts(feature, scratch, bins, bin_counts, n_bins, runs, run_counts, n_runs):
    n_bins = _take(scratch.histogram, scratch.ends[0], scratch.ends[1], feature * BINS, bins, bin_counts, n_bins)
    return n_bins, _take(scratch.run_lengths, 1, scratch.ends[2], feature * LONGEST_RUN, runs, run_counts, n_runs)


@njit(cache=True)
def _take(counted, first, last, offset, keys, counts, n):
    """Appends the nonzero counts to a list, and makes them zero."""
    for i in range(first, last + 1):
        if counted[i]:
            keys[n] = offset + i
            counts[n] = counted[i]
            counted[i] = 0
            n += 1
    return n


# The strongest moments


@njit(cache=True)
def insert(moments, value, clip, frame, speaker, per_speaker):
    """Inserts a clip's moment into the best ones, MOMENT [k], which are sorted by (value descending, clip); clips come in ascending order.

    per_speaker: at most so many of one speaker; 0 for no limit.
    """
    j = len(moments) - 1
    if not value > moments[j].value:  # the threshold, which rises
        return
    if per_speaker > 0:
        of_speaker, weakest = 0, j
        for i in range(len(moments)):
            if moments[i].clip >= 0 and moments[i].speaker == speaker:
                of_speaker += 1
                weakest = i
        if of_speaker == per_speaker:  # one of them has to go
            if not value > moments[weakest].value:
                return
            j = weakest
    while j > 0 and moments[j - 1].value < value:
        moments[j] = moments[j - 1]
        j -= 1
    moments[j].value = value
    moments[j].clip = clip
    moments[j].frame = frame
    moments[j].speaker = speaker


@njit(cache=True)
def merge_moments(a, b, per_speaker):
    """The best moments of two sets of clips, from the best of each, MOMENT [features, k]; per_speaker as in `insert`.

    Exact, and so associative and commutative. Let S(X) be what is kept of a set X: in the order of (value descending, clip) the first k of those
    that have fewer than M better ones of their speaker in X. Then x is in S(X) just if its speaker s has fewer than M better ones in X, and
    the sum over speakers of min(M, better ones of that speaker in X) is below k. Both numbers can only be smaller in a part of X. So
    (1) what S(X + Y) keeps, S(X) or S(Y) has kept, and S(S(X) + S(Y)) keeps. (2) It keeps no more: if S(X + Y) holds k moments there is no
    room; if it holds fewer, all that it left out have M better ones of their speaker, which by (1) are all there.
    """
    features, k = a.shape
    merged = np.zeros_like(a)
    for feature in range(features):
        i, j, n = 0, 0, 0
        while n < k:
            one, other = a[feature, min(i, k - 1)], b[feature, min(j, k - 1)]
            more_a, more_b = i < k and one.clip >= 0, j < k and other.clip >= 0
            if not more_a and not more_b:
                break
            from_a = more_a and (not more_b or one.value > other.value or (one.value == other.value and one.clip < other.clip))
            if from_a:
                merged[feature, n] = one
                i += 1
            else:
                merged[feature, n] = other
                j += 1
            of_speaker = 1
            if per_speaker > 0:
                for p in range(n):
                    of_speaker += merged[feature, p].speaker == merged[feature, n].speaker
            if per_speaker == 0 or of_speaker <= per_speaker:
                n += 1
        for rest in range(n, k):
            merged[feature, rest].value = 0
            merged[feature, rest].clip = -1
            merged[feature, rest].frame = 0
            merged[feature, rest].speaker = 0
    return merged


# Merging lists


@njit(cache=True)
def merge_counts(keys, counts, other_keys, other_counts):
    """Two ascending lists of int64 keys, each with a count -> one; counts of the same key are added."""
    room = len(keys) + len(other_keys)
    merged, merged_counts = np.empty(room, np.int64), np.empty(room, np.int64)
    i, j, n = 0, 0, 0
    while i < len(keys) or j < len(other_keys):
        from_a = j == len(other_keys) or (i < len(keys) and keys[i] <= other_keys[j])
        from_b = i == len(keys) or (j < len(other_keys) and other_keys[j] <= keys[i])
        merged[n] = keys[i] if from_a else other_keys[j]
        merged_counts[n] = (counts[i] if from_a else 0) + (other_counts[j] if from_b else 0)
        i += from_a
        j += from_b
        n += 1
    return merged[:n].copy(), merged_counts[:n].copy()


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
    return merged[:n].copy()


# Drawing examples


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


@njit(cache=True)
def draw_examples(candidates, start, features, range_edges, quantile_edges, lower_edges, kinds, per_bin):
    """Draws the examples of every feature from its candidates `start[feature]:start[feature + 1]`, by `draw`.

    features: int64, those that have any. range_edges, quantile_edges: float64 [len(features), bins + 1]. lower_edges: of the grid's positive
    bins. kinds: numbers for ranges and quantiles. Returns int64 arrays: feature, kind, bin, rank, index into the candidates.
    """
    room = len(features) * (range_edges.shape[1] + quantile_edges.shape[1]) * per_bin
    drawn, n = np.empty((5, room), np.int64), 0
    for i in range(len(features)):
        feature = features[i]
        own = candidates[start[feature] : start[feature + 1]]
        order = np.argsort(own["hash"], kind="mergesort")
        own = own[order]
        # A quantile's edges are those of the grid, so a value's fine bin decides, also where it lies beyond the grid.
        lower = lower_edges[own["cell"] % MAGNITUDES]
        for kind in range(2):
            edges = range_edges[i] if kind == 0 else quantile_edges[i]
            n_bins = len(edges) - 1
            bins = np.empty(len(own), np.int64)
            for j in range(len(own)):
                value = np.float64(own[j].value) if kind == 0 else lower[j]
                # From the right: of bins with the same lower edge only the last one has any width.
                bins[j] = min(max(np.searchsorted(edges, value, side="right") - 1, 0), n_bins - 1)
            taken = draw(bins, own["clip"], n_bins, per_bin)
            for b in range(n_bins):
                for rank in range(per_bin):
                    if taken[b, rank] >= 0:
                        drawn[:, n] = feature, kinds[kind], b, rank, start[feature] + order[taken[b, rank]]
                        n += 1
    return drawn[:, :n]

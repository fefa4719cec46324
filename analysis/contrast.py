"""Which features fire in some stretches of speech more than elsewhere: at a phone, a word, whatever a regular expression finds.

Only the clips with such stretches are read. What the features do in all other rows follows from the scan's own sums: its counts, means and
histograms are over all rows, so "elsewhere" is all rows less those inside.

The measure is the area under the ROC curve over frames, the chance that a frame inside has a higher value than one outside, ties counting
half: 1 is a feature that is always higher inside, 0.5 says nothing. It is linear in the values' midranks among all rows (Mann and Whitney,
1947), and those follow from the histogram: values in the same bin of the grid (`analysis.grid`, 16 bins an octave) count as ties.

**The control.** Few frames, each like its neighbour, and thousands of features: some will be high by chance. So the same stretches are
moved, MOVED times, each clip's by a random time of its own (what passes the clip's end comes in again at its start), and the same is asked
of them: same clips, same speakers, same lengths, other words. `auc_moved` is the most that the feature itself reaches there, `chance_auc`
the most that any feature does: a feature above it is so by luck at most once in MOVED + 1 times, however many features were looked at. Of
stretches in more than CONTROL_CLIPS clips only those in so many are moved: fewer frames, so more luck, so a stricter bound.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from analysis.grid import BINS, FIRST_CODE, MAGNITUDES, MANTISSA_SHIFT, frame_hash
from analysis.moments import read_clips
from analysis.scan_folder import Scan
from analysis.spoken import Said, frames_of
from cache.errors import HearsaeError
from cache.store import ActivationStore

if TYPE_CHECKING:
    from analysis.features import Features

MOVED = 20
"""Times that the stretches are moved: the most of 20 is a bound that luck passes once in 21 times."""
CONTROL_CLIPS = 24
"""Clips in which stretches are moved: the values of all of their frames are needed, where else those inside are enough."""
HALF_COUNT = 0.5
"""Added to every count of a log-odds ratio, which else is infinite where a count is 0 (Haldane, 1956)."""


class Contrast(NamedTuple):
    """Every feature inside some stretches against all other rows of the scan."""

    occurrences: int
    """Stretches that hold the middle of a frame at least, in clips that have rows."""
    clips: int
    frames: int
    """Inside."""
    auc: np.ndarray
    """float64 [features]"""
    auc_moved: np.ndarray
    """float64 [features]: the feature's highest AUC for the moved stretches."""
    chance_auc: float
    """The highest AUC of any feature for the moved stretches."""
    mean_inside: np.ndarray
    """float64 [features]"""
    mean_outside: np.ndarray
    """float64 [features]"""
    rate_inside: np.ndarray
    """float64 [features]: share of frames in which the feature is > 0."""
    rate_outside: np.ndarray
    """float64 [features]"""
    log_odds: np.ndarray
    """float64 [features]: log of the odds of being > 0 inside over those outside."""


def contrast(scan: Scan, store: ActivationStore, features: "Features", said: Said) -> Contrast:
    """Compares the frames whose middle lies in `said` with all other rows of the scan.

    store: the one that was scanned. features: those of the scan.
    Raises HearsaeError where the store is another one or has grown since, and where no frame lies inside, or none outside.
    """
    _refuse_other_store(scan, store)
    first, stop = frames_of(said, store)
    inside = {clip: (first[said.clip == clip], stop[said.clip == clip]) for clip in np.unique(said.clip).tolist()}
    control = _control_clips(scan, inside)
    ranks = MidRanks.of(scan)
    count, occurrences, clips = features.count, 0, 0
    sums = Sums.none(count)
    moved = [Sums.none(count) for _ in range(MOVED)]
    for spans, rows in read_clips(store, features.site, inside):
        masks, chosen = [], np.zeros(len(rows), bool)
        for span in spans:
            mask = _mask(*inside[span.clip], span.stop - span.start)
            occurrences += int((inside[span.clip][1] > inside[span.clip][0]).sum())
            clips += 1
            masks.append((span, mask))
            at = slice(span.start - spans[0].start, span.stop - spans[0].start)
            chosen[at] = True if span.clip in control else mask
        weights = np.zeros((1 + MOVED, len(rows)), np.float32)
        for span, mask in masks:
            at = slice(span.start - spans[0].start, span.stop - spans[0].start)
            weights[0, at] = mask
            if span.clip in control:
                for i, shift in enumerate(_shifts(scan, span.clip, len(mask))):
                    weights[1 + i, at] = np.roll(mask, shift)
        _add(features, rows[chosen], weights[:, chosen], ranks, sums, moved)
    return _compare(scan, sums, moved, occurrences, clips, said.what)


def top_contrast(scan: Scan, compared: Contrast, n: int = 10) -> list[dict[str, Any]]:
    """The `n` features with the highest AUC above 0.5, best first: `feature`, the columns of `Contrast`, and the scan's `density` and `max`."""
    names = ("auc", "auc_moved", "mean_inside", "mean_outside", "rate_inside", "rate_outside", "log_odds")
    order = np.argsort(-compared.auc, kind="stable")[:n]
    scanned = scan.features.select(["density", "max"]).take(order).to_pylist()
    return [
        {"feature": i} | {name: float(getattr(compared, name)[i]) for name in names} | row
        for i, row in zip(order.tolist(), scanned, strict=True)
        if compared.auc[i] > 0.5
    ]


def _refuse_other_store(scan: Scan, store: ActivationStore) -> None:
    site = scan.info["site"]
    if scan.info["model"]["sha256"] != store.header.model["sha256"] or scan.info["rows"] > store.clips["n_frames"].to_numpy().sum():
        raise HearsaeError(f"{store.path} is not the store of the scan {scan.path}: what lies outside follows from the scan of the same store")
    shards = len(store.committed(site))
    if shards != scan.info["shards"]:
        raise HearsaeError(f"{store.path} has {shards} shards of {site}, the scan {scan.path} saw {scan.info['shards']}: run 'hearsae scan' again")


def _control_clips(scan: Scan, clips: Any) -> set[int]:
    numbers = np.fromiter(clips, np.int64)
    hashes = frame_hash(scan.info["options"]["seed"], numbers, np.zeros_like(numbers))
    return set(numbers[np.argsort(hashes, kind="stable")[:CONTROL_CLIPS]].tolist())


def _shifts(scan: Scan, clip: int, n_frames: int) -> list[int]:
    """How far the stretches of a clip are moved, each time: between 1 and n_frames - 1 frames."""
    hashes = frame_hash(scan.info["options"]["seed"], np.full(MOVED, clip), np.arange(MOVED))
    return [1 + int(h % np.uint64(max(n_frames - 1, 1))) for h in hashes]


def _mask(first: np.ndarray, stop: np.ndarray, n_frames: int) -> np.ndarray:
    steps = np.zeros(n_frames + 1, np.int64)
    np.add.at(steps, first, 1)
    np.add.at(steps, stop, -1)
    return np.cumsum(steps)[:-1] > 0


# Sums over rows


class Sums(NamedTuple):
    """Of some rows, over every feature."""

    rows: np.ndarray
    """int64 []"""
    ranks: np.ndarray
    """float64 [features]: midranks among all rows, as shares of them."""
    values: np.ndarray
    """float64 [features]"""
    active: np.ndarray
    """int64 [features]"""

    @classmethod
    def none(cls, count: int) -> "Sums":
        return cls(np.zeros((), np.int64), np.zeros(count), np.zeros(count), np.zeros(count, np.int64))


def _add(features: "Features", rows: np.ndarray, weights: np.ndarray, ranks: "MidRanks", sums: Sums, moved: list[Sums]) -> None:
    """Adds the rows with weight 1 to each set of rows. weights: float32 [sets, rows], 0 or 1, those inside first."""
    for own, part in zip(weights, (sums, *moved), strict=True):
        part.rows[...] += int(own.sum())
    inside = weights[0] > 0
    codes = features.sparse(rows)
    if codes is None:
        values = features.dense(rows)
        sums.values[:] += values[inside].sum(axis=0, dtype=np.float64)
        sums.active[:] += (values[inside] > 0).sum(axis=0)
        for own, part in zip(weights @ ranks.dense(values), (sums, *moved), strict=True):
            part.ranks[:] += own
        return
    counted = inside[codes.row]
    sums.values[:] += np.bincount(codes.latent[counted], codes.value[counted], minlength=features.count)
    sums.active[:] += np.bincount(codes.latent[counted & (codes.value > 0)], minlength=features.count)
    above_zero = ranks.sparse(codes.latent, codes.value) - ranks.zero[codes.latent]
    for own, part in zip(weights, (sums, *moved), strict=True):
        part.ranks[:] += np.bincount(codes.latent, above_zero * own[codes.row], minlength=features.count) + own.sum() * ranks.zero


def _compare(scan: Scan, sums: Sums, moved: list[Sums], occurrences: int, clips: int, what: str) -> Contrast:
    rows, inside = scan.info["rows"], int(sums.rows)
    outside = rows - inside
    if inside < 1 or outside < 1:
        raise HearsaeError(f"{what} is in {inside} of the {rows} rows of {scan.path}: there is nothing to compare")
    mean, active = scan.features["mean"].to_numpy(), scan.features["active"].to_numpy()
    active_outside = active - sums.active
    odds = [(hits + HALF_COUNT) / (n - hits + HALF_COUNT) for hits, n in ((sums.active, inside), (active_outside, outside))]
    auc_moved = np.max([_auc(part, rows) for part in moved if part.rows] or [np.full(len(mean), np.nan)], axis=0)
    return Contrast(
        occurrences=occurrences,
        clips=clips,
        frames=inside,
        auc=_auc(sums, rows),
        auc_moved=auc_moved,
        chance_auc=float(auc_moved.max()),
        mean_inside=sums.values / inside,
        mean_outside=(mean * rows - sums.values) / outside,
        rate_inside=sums.active / inside,
        rate_outside=active_outside / outside,
        log_odds=np.log(odds[0] / odds[1]),
    )


def _auc(sums: Sums, rows: int) -> np.ndarray:
    """Against all rows but these. Their mean midrank counts them among themselves too, where the chance is one half."""
    n = int(sums.rows)
    return (sums.ranks / n * rows - n / 2) / (rows - n)


# Midranks, from histograms


class MidRanks(NamedTuple):
    """For every feature and every bin of the grid, the share of all rows with lower values, and half of those in the same bin.

    Places are the grid's bins with zero's own between the signs; a feature's table goes from its lowest place to its highest.
    """

    low: np.ndarray
    """int64 [features]: the lowest place that any row has."""
    start: np.ndarray
    """int64 [features + 1]: where in `table` the feature's places begin."""
    table: np.ndarray
    """float32"""
    zero: np.ndarray
    """float32 [features]: of the value zero."""

    @classmethod
    def of(cls, scan: Scan) -> "MidRanks":
        """From the histograms of the scan."""
        columns = [scan.features[name].combine_chunks() for name in ("hist_lo", "hist_hi", "hist_count")]
        bounds = columns[0].offsets.to_numpy().astype(np.int64)
        lo, hi, counts = (column.values.to_numpy()[bounds[0] : bounds[-1]] for column in columns)
        feature = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
        place = _place((lo + hi) / 2)
        zeros = scan.info["rows"] - np.bincount(feature, counts, minlength=len(bounds) - 1).astype(np.int64)
        has_zeros = np.flatnonzero(zeros)
        feature, place = np.append(feature, has_zeros), np.append(place, np.full(len(has_zeros), MAGNITUDES))
        counts = np.append(counts, zeros[has_zeros])
        low, high = np.full(len(zeros), BINS), np.full(len(zeros), 0)
        np.minimum.at(low, feature, place)
        np.maximum.at(high, feature, place)
        start = np.append(0, np.cumsum(high - low + 1))
        in_table = np.zeros(start[-1], np.int64)
        in_table[start[feature] + place - low[feature]] = counts
        below = np.append(0, np.cumsum(in_table))[:-1]
        below -= np.repeat(below[start[:-1]], np.diff(start))
        table = ((below + in_table / 2) / scan.info["rows"]).astype(np.float32)
        return cls(low, start, table, cls(low, start, table, low).sparse(np.arange(len(zeros)), np.zeros(len(zeros))))

    def sparse(self, feature: np.ndarray, value: np.ndarray) -> np.ndarray:
        """float32 [n]: of values (float32 [n]) of features (int [n])."""
        last = self.start[feature + 1] - 1
        return self.table[np.clip(_place(value) + (self.start[:-1] - self.low)[feature], self.start[feature], last)]

    def dense(self, values: np.ndarray) -> np.ndarray:
        """float32 [rows, features]: of values float32 [rows, features]."""
        start = self.start.astype(np.int32)
        at = _place(values)
        at += start[:-1] - self.low.astype(np.int32)
        np.clip(at, start[:-1], start[1:] - 1, out=at)
        return self.table[at]


def _place(values: np.ndarray) -> np.ndarray:
    """int32: `analysis.grid.bin_of`, with zero's place between the signs; in 32 bits and in place, for many values."""
    bits = np.ascontiguousarray(values, np.float32).view(np.int32)
    sign = bits >> 31  # -1 or 0
    place = bits & 0x7FFFFFFF
    place >>= MANTISSA_SHIFT
    place -= FIRST_CODE
    np.clip(place, 0, MAGNITUDES - 1, out=place)
    place ^= sign  # of a negative value -1 - magnitude
    place += sign
    place += MAGNITUDES + 1
    place[bits & 0x7FFFFFFF == 0] = MAGNITUDES
    return place

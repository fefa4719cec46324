"""The scan: one pass over a store that finds, for every feature of a set, when it is active and how strongly.

Per shard `scan_shard` gives a `ShardScan`; `merge` joins any two; the last one becomes a folder of Parquet files. Merging is
exact, associative and commutative, so any split over workers and any order of merging gives the same bytes: counts are integers, sums
are integers too (a block's float64 sum, in fixed point), and which frames are examples follows from values and from a seeded hash of
(clip, frame), never from who came first.

What is exact: counts, sums, top-k (with at most M clips of a speaker too: `analysis.kernels.merge_moments`), histograms, runs, pairs, quantile
bins and their examples. A quantile's edges are those of the value grid (`analysis.grid`) closest to equal counts. What is not: a fine bin of
the grid that straddles the edge of a range offers to either range only those of its `per_bin` frames of lowest hash that fall there, so a
range may get fewer examples than it could, and these less evenly drawn; every one of them does lie in its range.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc

from analysis import evidence, kernels
from analysis.blocks import Block, blocks
from analysis.coactivation import PARTNERS, WIDEST, PairCounter, Pairs, no_pairs
from analysis.features import Features, open_features
from analysis.grid import fixed_point, frame_hash
from analysis.kernels import CANDIDATE
from analysis.phone_counts import PhoneCounts, PhoneTally, compact, count_block, merge_counts
from analysis.phone_labels import PhoneLabels, labels_of
from analysis.scan_folder import Scan, forget_scan, refuse_other_folder, write_scan
from cache.errors import HearsaeError
from cache.location import Location, location
from cache.store import ActivationStore
from cache.timings import has_timings, read_timings


@dataclass(frozen=True)
class ScanOptions:
    """Which examples a scan keeps of every feature, and what else it counts."""

    top: int = 20
    """Strongest examples, and as many most negative ones, at most one per clip."""
    per_speaker: int = 0
    """Of those at most so many of one speaker; 0 for no limit. A clip without a speaker is its own."""
    ranges: int = 10
    """Equally wide ranges of activation, from 0 to the feature's maximum, to draw examples from."""
    quantiles: int = 10
    """Bins that hold equally many of the active frames, to draw examples from."""
    per_bin: int = 5
    """Examples drawn from every range and every quantile, at most one per clip."""
    coactive: int | None = None
    """Partners of every feature: those it is most often active together with; 0 counts no pairs. Default: 10 for up to 8192 features, else 0."""
    coactive_among: int = 64
    """Pairs are counted among so many strongest features of a row."""
    no_phones: bool = False
    """Leave out which phones each feature follows, which is counted where 'hearsae align' has found when they are said."""
    seed: int = 0
    """Of the draw, and of a random basis."""

    def __post_init__(self) -> None:
        for name in ("top", "ranges", "quantiles", "per_bin", "coactive_among"):
            if getattr(self, name) < 1:
                raise HearsaeError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 1")
        for name in ("per_speaker", "coactive"):
            if (getattr(self, name) or 0) < 0:
                raise HearsaeError(f"--{name.replace('_', '-')} {getattr(self, name)} must not be negative")
        if not 0 <= self.seed < 2**64:
            raise HearsaeError(f"--seed {self.seed} must be between 0 and 2^64 - 1")

    def partners(self, features: int) -> int:
        """`coactive`, or its default for so many features."""
        return self.coactive if self.coactive is not None else PARTNERS if features <= WIDEST else 0


class Counts(NamedTuple):
    """How often each of some keys was seen."""

    keys: np.ndarray
    """int64, ascending"""
    counts: np.ndarray
    """int64, positive"""

    def merge(self, other: "Counts") -> "Counts":
        """Of both."""
        return Counts(*kernels.merge_counts(*self, *other))


class Moments(NamedTuple):
    """Sums over values, and their bounds."""

    total: np.ndarray
    """Python int [3, features]: sums of values, of their squares and of positive values, times 2^FRACTION_BITS."""
    low: np.ndarray
    """float32 [features]: smallest value; inf without rows."""
    high: np.ndarray
    """float32 [features]: largest value; -inf without rows."""

    def merge(self, other: "Moments") -> "Moments":
        """Of both."""
        return Moments(self.total + other.total, np.minimum(self.low, other.low), np.maximum(self.high, other.high))


class Runs(NamedTuple):
    """Maximal stretches of consecutive frames of a clip in which a feature is positive."""

    length: Counts
    """Of keys feature * LONGEST_RUN + frames."""
    rise: np.ndarray
    """int64 [features]: frames from a run's first to its (first) largest value, summed over runs."""
    fall: np.ndarray
    """int64 [features]: frames from there to its last."""

    def merge(self, other: "Runs") -> "Runs":
        """Of both."""
        return Runs(self.length.merge(other.length), self.rise + other.rise, self.fall + other.fall)


@dataclass(frozen=True)
class ShardScan:
    """What some rows say about every feature. Travels between processes.

    What else is to be found in the same pass becomes one more field: a line each in `empty`, `merge` and `_scan_block`.
    """

    options: ScanOptions
    shards: tuple[int, ...]
    rows: int
    moments: Moments
    bins: Counts
    """Of keys feature * BINS + bin."""
    runs: Runs
    pairs: Pairs
    top: np.ndarray
    """MOMENT [features, top], by (value descending, clip)."""
    bottom: np.ndarray
    """MOMENT [features, top]: the same of the negated values."""
    candidates: np.ndarray
    """CANDIDATE, by (cell, hash, clip): of every cell the `per_bin` frames of lowest hash, one per clip."""
    phones: PhoneCounts | None = None
    """How often each feature had which value in which phone; counted shard by shard, where the store has timings."""


MapShards = Callable[[Callable[[int], Any], Callable[[Any, Any], Any], Iterable[int]], Iterable[Any]]


def in_this_process(function: Callable[[int], Any], merge: Callable[[Any, Any], Any], shards: Iterable[int]) -> Iterable[Any]:
    """One shard after the other; none of them merged yet."""
    return map(function, shards)


def scan(
    store: ActivationStore,
    spec: str,
    out: str | Location,
    options: ScanOptions | None = None,
    *,
    map_shards: MapShards = in_this_process,
    follow: float | None = None,
) -> Scan:
    """Scans every committed shard and writes the folder `out`, whose files `analysis.scan_folder` describes.

    spec: which features, see `analysis.features.open_features`.
    map_shards: (function, merge, shards) -> the function's results in any order, merged with each other or not. The functions can be pickled.
    follow: scan all shards of the plan, each as it is committed, and wait so many seconds for the next.
    Where the store has timings, phones are counted in the same pass and looked at closer in a second one (`analysis.evidence`).
    Memory does not grow with the number of shards. Raises HearsaeError where there are no rows, or rows that are not finite.
    """
    options = options or ScanOptions()
    refuse_other_folder(location(out))
    kind, _, site = spec.partition(":")
    if follow is not None and kind in ("pca", "random") and store.committed(site) != list(range(store.axis(site).shards)):
        raise HearsaeError(f"{spec} follows from all rows, and {store.path} is not complete: scan it once 'hearsae cache' has finished")
    features = open_features(spec, store, options.seed)
    options = replace(options, coactive=options.partners(features.count))
    labels = _labels(store, features, options)
    scan_one = partial(scan_shard, features, store, labels=labels, options=options)
    shards: Iterable[int]
    if follow is None:
        shards = expected = store.committed(features.site)
    else:
        expected = list(range(store.axis(features.site).shards))
        shards = store.arriving(features.site, patience=follow)
    merged = reduce(merge, map_shards(scan_one, merge, shards), empty(features, options))
    if list(merged.shards) != expected:
        raise HearsaeError(f"scanned shards {list(merged.shards)} of {store.path}, not {expected}: some results were lost")
    if not merged.rows:
        raise HearsaeError(f"{store.path} has no rows of {features.site} yet: run 'hearsae cache' first")
    out = location(out)
    forget_scan(out)
    if labels and merged.phones and merged.phones.frames.any():
        evidence.measure(features, store, labels, out, merged.phones, lambda one, join: reduce(join, map_shards(one, join, expected)))
    write_scan(merged, store, features, out)
    return Scan.open(out)


def _labels(store: ActivationStore, features: Features, options: ScanOptions) -> PhoneLabels | None:
    """Which phones the store's frames lie in; None where that is not known, or not wanted."""
    if options.no_phones or store.sites[features.site]["axis"] != "frame" or not has_timings(store):
        return None
    phones = read_timings(store).phones
    return labels_of(phones, store.clips, options.seed) if phones.num_rows else None


def scan_shard(features: Features, store: ActivationStore, shard: int, options: ScanOptions, labels: PhoneLabels | None = None) -> ShardScan:
    """One committed shard. Depends on nothing but its arguments."""
    tally = PhoneTally(features.count, len(labels.phones)) if labels else None
    counter = PairCounter(features.count, options.coactive_among) if options.partners(features.count) else None
    merged = empty(features, options)
    for block in blocks(features, store, shard):
        merged = merge(merged, _scan_block(block, store, features.count, options, counter))
        if labels and tally:
            count_block(block, labels, tally)
    return replace(merged, shards=(shard,), pairs=counter.pairs() if counter else merged.pairs, phones=compact(tally) if tally else None)


def empty(features: Features, options: ScanOptions) -> ShardScan:
    """The scan of no rows, which changes nothing that it is merged with."""
    f = features.count
    none = Counts(np.zeros(0, np.int64), np.zeros(0, np.int64))
    return ShardScan(
        options=options,
        shards=(),
        rows=0,
        moments=Moments(np.full((3, f), 0, object), np.full(f, np.inf, np.float32), np.full(f, -np.inf, np.float32)),
        bins=none,
        runs=Runs(none, np.zeros(f, np.int64), np.zeros(f, np.int64)),
        pairs=no_pairs(f),
        top=kernels.no_moments(f, options.top),
        bottom=kernels.no_moments(f, options.top),
        candidates=np.zeros(0, CANDIDATE),
    )


def merge(a: ShardScan, b: ShardScan) -> ShardScan:
    """The scan of the rows of both, of which they share none."""
    fewer, more = sorted((a.shards, b.shards), key=len)
    if not set(fewer).isdisjoint(more):
        raise ValueError(f"merging shards {sorted(set(a.shards) & set(b.shards))} twice")
    if not a.rows or not b.rows:
        return replace(a if a.rows else b, shards=tuple(sorted(a.shards + b.shards)))
    options = a.options
    return ShardScan(
        options=options,
        shards=tuple(sorted(a.shards + b.shards)),
        rows=a.rows + b.rows,
        moments=a.moments.merge(b.moments),
        bins=a.bins.merge(b.bins),
        runs=a.runs.merge(b.runs),
        pairs=a.pairs.merge(b.pairs),
        top=kernels.merge_moments(a.top, b.top, options.per_speaker),
        bottom=kernels.merge_moments(a.bottom, b.bottom, options.per_speaker),
        candidates=kernels.merge_candidates(a.candidates, b.candidates, options.per_bin),
        phones=merge_counts(a.phones, b.phones) if a.phones and b.phones else None,
    )


# One block of rows


def _scan_block(block: Block, store: ActivationStore, n_features: int, options: ScanOptions, counter: PairCounter | None) -> ShardScan:
    """Of a block of rows; its pairs are added to the counter."""
    rows = _rows(block, store, options)
    tally = kernels.new_tally(n_features, options.top)
    keep = (rows, options.per_bin, options.per_speaker, tally)
    if block.dense is not None:
        found = kernels.tally_dense(block.dense, *keep)
    else:
        found = kernels.tally_sparse(block.start, block.latent, block.value, *keep)
    if counter and block.dense is not None:
        counter.add_dense(block.dense)
    elif counter:
        counter.add_sparse(block.start, block.latent, block.value)

    n_rows = len(block.clip_of_row)
    has_zeros = tally.nonzero < n_rows  # of either sign, stored or left out: all of them are +0
    low, high = np.where(has_zeros, np.minimum(tally.low, 0), tally.low), np.where(has_zeros, np.maximum(tally.high, 0), tally.high)
    return ShardScan(
        options=options,
        shards=(),
        rows=n_rows,
        moments=Moments(fixed_point(tally.total), low + np.float32(0), high + np.float32(0)),
        bins=Counts(found.bins, found.bin_counts),
        runs=Runs(Counts(found.runs, found.run_counts), tally.rise, tally.fall),
        pairs=no_pairs(n_features),
        top=tally.top,
        bottom=tally.bottom,
        candidates=found.candidates,
    )


def _rows(block: Block, store: ActivationStore, options: ScanOptions) -> kernels.Rows:
    hashes = frame_hash(options.seed, block.clip_of_row, block.frame_of_row)
    rank = np.empty(len(hashes), np.int32)
    rank[np.argsort(hashes, kind="stable")] = np.arange(len(hashes))
    clip_of_row = np.repeat(np.arange(len(block.clips), dtype=np.int32), np.diff(block.first_row))
    speaker = speakers(store, block.clips) if options.per_speaker else np.zeros_like(block.clips)
    return kernels.Rows(block.first_row, block.clips, speaker, clip_of_row, hashes, rank)


def speakers(store: ActivationStore, clips: np.ndarray) -> np.ndarray:
    """int32 [clips]: a number for the speaker of each, the same in every process; negative ones for clips that name none."""
    number = pc.dictionary_encode(store.clips["speaker"].combine_chunks()).indices.fill_null(-1).to_numpy()[clips]
    return np.where(number < 0, -1 - clips, number).astype(np.int32)

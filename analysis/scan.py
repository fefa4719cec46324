"""The scan: one pass over a store that finds, for every feature of a set, when it is active and how strongly.

Per shard `scan_shard` gives a `ShardScan`; `merge` joins any two; `finish` turns the last one into a folder of Parquet files. Merging is
exact, associative and commutative, so any split over workers and any order of merging gives the same bytes: counts are integers, sums
are integers too (a block's float64 sum, in fixed point), and which frames are examples follows from values and from a seeded hash of
(clip, frame), never from who came first.

What is exact: counts, sums, top-k, histograms, quantile bins and their examples. A quantile's edges are those of the value grid
(`analysis.grid`) closest to equal counts. What is not: a fine bin of the grid that straddles the edge of a range offers to either range
only those of its `per_bin` frames of lowest hash that fall there, so a range may get fewer examples than it could, and these less evenly
drawn; every one of them does lie in its range.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial, reduce

import numpy as np

from analysis.blocks import Block, blocks
from analysis.features import Features, open_features
from analysis.grid import BINS, fixed_point, frame_hash
from analysis.kernels import CANDIDATE, MOMENT, Tally, merge_candidates, new_tally, tally_dense, tally_sparse, top_dense, top_sparse
from analysis.scan_folder import Scan, refuse_other_folder, write_scan
from cache.errors import HearsaeError
from cache.location import Location, location
from cache.store import ActivationStore


@dataclass(frozen=True)
class ScanOptions:
    """Which examples a scan keeps of every feature."""

    top: int = 20
    """Strongest examples, at most one per clip."""
    ranges: int = 10
    """Equally wide ranges of activation, from 0 to the feature's maximum, to draw examples from."""
    quantiles: int = 10
    """Bins that hold equally many of the active frames, to draw examples from."""
    per_bin: int = 5
    """Examples drawn from every range and every quantile, at most one per clip."""
    seed: int = 0
    """Of the draw, and of a random basis."""

    def __post_init__(self) -> None:
        for name in ("top", "ranges", "quantiles", "per_bin"):
            if getattr(self, name) < 1:
                raise HearsaeError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 1")
        if not 0 <= self.seed < 2**64:
            raise HearsaeError(f"--seed {self.seed} must be between 0 and 2^64 - 1")


@dataclass(frozen=True)
class ShardScan:
    """What some rows say about every feature. Travels between processes."""

    options: ScanOptions
    shards: tuple[int, ...]
    rows: int
    total: np.ndarray
    """Python int [3, features]: sums of values, of their squares and of positive values, times 2^FRACTION_BITS."""
    low: np.ndarray
    """float32 [features]: smallest value; inf without rows."""
    high: np.ndarray
    """float32 [features]: largest value; -inf without rows."""
    bins: np.ndarray
    """int64, ascending: feature * BINS + bin, for the bins that hold anything."""
    bin_counts: np.ndarray
    """int64, of the same length."""
    top: np.ndarray
    """MOMENT [features, top], by (value descending, clip)."""
    candidates: np.ndarray
    """CANDIDATE, by (cell, hash, clip): of every cell the `per_bin` frames of lowest hash, one per clip."""


MapShards = Callable[[Callable[[int], ShardScan], Iterable[int]], Iterable[ShardScan]]


def scan(
    store: ActivationStore,
    spec: str,
    out: str | Location,
    options: ScanOptions | None = None,
    *,
    map_shards: MapShards = map,
    follow: float | None = None,
) -> Scan:
    """Scans every committed shard and writes the folder `out`, whose files `analysis.scan_folder` describes.

    spec: which features, see `analysis.features.open_features`.
    map_shards: (function, shards) -> the function's results in any order, merged with each other or not. The function can be pickled.
        The default runs in this process, one shard after the other.
    follow: scan all shards of the plan, each as it is committed, and wait so many seconds for the next.
    Memory does not grow with the number of shards. Raises HearsaeError where there are no rows, or rows that are not finite.
    """
    options = options or ScanOptions()
    refuse_other_folder(location(out))
    features = open_features(spec, store, options.seed)
    scan_one = partial(scan_shard, features, store, options=options)
    shards: Iterable[int]
    if follow is None:
        shards = expected = store.committed(features.site)
    else:
        expected = list(range(store.axis(features.site).shards))
        if spec.startswith("random:") and store.committed(features.site) != expected:
            raise HearsaeError(f"{spec} needs the mean of all rows, and {store.path} is not complete: scan it once 'hearsae cache' has finished")
        shards = store.arriving(features.site, patience=follow)
    merged = reduce(merge, map_shards(scan_one, shards), empty(features, options))
    if list(merged.shards) != expected:
        raise HearsaeError(f"scanned shards {list(merged.shards)} of {store.path}, not {expected}: some results were lost")
    return finish(merged, store, features, location(out))


def scan_shard(features: Features, store: ActivationStore, shard: int, options: ScanOptions) -> ShardScan:
    """One committed shard. Depends on nothing but its arguments."""
    nothing = empty(features, options)
    scanned = (_scan_block(block, features.count, options, nothing.top) for block in blocks(features, store, shard))
    return replace(reduce(merge, scanned, nothing), shards=(shard,))


def empty(features: Features, options: ScanOptions) -> ShardScan:
    """The scan of no rows, which changes nothing that it is merged with."""
    f = features.count
    top = np.zeros((f, options.top), MOMENT)
    top["clip"] = -1
    integers = np.zeros(0, np.int64)
    low, high = np.full(f, np.inf, np.float32), np.full(f, -np.inf, np.float32)
    return ShardScan(options, (), 0, np.full((3, f), 0, object), low, high, integers, integers, top, np.zeros(0, CANDIDATE))


def merge(a: ShardScan, b: ShardScan) -> ShardScan:
    """The scan of the rows of both, of which they share none."""
    fewer, more = sorted((a.shards, b.shards), key=len)
    if not set(fewer).isdisjoint(more):
        raise ValueError(f"merging shards {sorted(set(a.shards) & set(b.shards))} twice")
    bins, bin_counts = _merge_counts(a, b)
    return ShardScan(
        options=a.options,
        shards=tuple(sorted(a.shards + b.shards)),
        rows=a.rows + b.rows,
        total=a.total + b.total,
        low=np.minimum(a.low, b.low),
        high=np.maximum(a.high, b.high),
        bins=bins,
        bin_counts=bin_counts,
        top=_merge_top(a.top, b.top),
        candidates=merge_candidates(a.candidates, b.candidates, a.options.per_bin).copy(),
    )


def _merge_counts(a: ShardScan, b: ShardScan) -> tuple[np.ndarray, np.ndarray]:
    bins = np.concatenate([a.bins, b.bins])
    order = np.argsort(bins, kind="stable")  # two ascending runs: merged in linear time
    bins = bins[order]
    first = np.flatnonzero(np.diff(bins, prepend=-1))
    counts = np.concatenate([a.bin_counts, b.bin_counts])[order]
    return bins[first], np.add.reduceat(counts, first) if len(first) else counts


def _merge_top(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    both = np.concatenate([a, b], axis=1)
    order = np.lexsort((both["clip"], -both["value"]), axis=1)
    return np.take_along_axis(both, order[:, : a.shape[1]], axis=1)


def finish(merged: ShardScan, store: ActivationStore, features: Features, out: Location) -> Scan:
    """Writes the folder of a scan. Raises HearsaeError where no rows were scanned, StoreError where it can't be written."""
    if not merged.rows:
        raise HearsaeError(f"{store.path} has no rows of {features.site} yet: run 'hearsae cache' first")
    write_scan(merged, store, features, out)
    return Scan.open(out)


# One block of rows


def _scan_block(block: Block, n_features: int, options: ScanOptions, empty_top: np.ndarray) -> ShardScan:
    hashes = frame_hash(options.seed, block.clip_of_row, block.frame_of_row)
    order = np.argsort(hashes, kind="stable")
    tally = new_tally(n_features, options.per_bin)
    top = empty_top.copy()
    if block.dense is not None:
        tally_dense(block.dense, order, block.clip_of_row, tally)
        top_dense(block.dense, block.first_row, block.clips, top)
    else:
        tally_sparse(block.start, block.latent, block.value, order, block.clip_of_row, tally)
        top_sparse(block.start, block.latent, block.value, block.first_row, block.clips, top)

    counts = np.ascontiguousarray(tally.histogram[:, :BINS])
    bins = np.flatnonzero(counts)
    n_rows = len(block.clip_of_row)
    has_zeros = counts.sum(axis=1) < n_rows  # of either sign, stored or left out: all of them are +0
    return ShardScan(
        options=options,
        shards=(),
        rows=n_rows,
        total=fixed_point(tally.total),
        low=np.where(has_zeros, np.minimum(tally.low, 0), tally.low) + np.float32(0),
        high=np.where(has_zeros, np.maximum(tally.high, 0), tally.high) + np.float32(0),
        bins=bins,
        bin_counts=counts.ravel()[bins].astype(np.int64),
        top=top,
        candidates=_candidates(tally, hashes, block.clip_of_row, block.frame_of_row),
    )


def _candidates(tally: Tally, hashes: np.ndarray, clip_of_row: np.ndarray, frame_of_row: np.ndarray) -> np.ndarray:
    cells = np.flatnonzero(tally.kept)
    n_kept = tally.kept.ravel()[cells]
    slot = np.arange(n_kept.sum()) - np.repeat(np.cumsum(n_kept) - n_kept, n_kept)
    cell = np.repeat(cells, n_kept)
    per_bin = tally.slot_row.shape[2]
    row = tally.slot_row.reshape(-1, per_bin)[cell, slot]
    found = np.empty(len(cell), CANDIDATE)
    found["cell"] = cell
    found["hash"], found["clip"], found["frame"] = hashes[row], clip_of_row[row], frame_of_row[row]
    found["value"] = tally.slot_value.reshape(-1, per_bin)[cell, slot]
    return found

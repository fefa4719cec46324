"""First pass of phone evidence: of every feature and phone, how many frames have a value in which bin, and the same under shuffled labels.

Counts are integers on a fixed grid: any split into shards and any order of merging gives the same. A scan, which has the blocks in
hand anyway, calls `count_block` for each and `compact` at the end of a shard; `count_shard` is the same on its own.
"""

from collections.abc import Iterable, Iterator
from functools import reduce
from typing import NamedTuple

import numpy as np

from analysis.blocks import Block, blocks
from analysis.features import Features
from analysis.phone_kernels import BINS, ZERO, bin_of, count_dense, merge_cells, sparse_cells
from analysis.phone_labels import PhoneLabels
from cache.store import ActivationStore

CHUNK_FEATURES = 64
"""Features whose counts are spread out at a time: some ten megabytes."""


class Cells(NamedTuple):
    """How many frames are in each cell, (feature * phones + phone) * BINS + bin; zeros are in none."""

    cell: np.ndarray
    """int64, ascending."""
    frames: np.ndarray
    """int64, of the same length."""


class PhoneCounts(NamedTuple):
    """What some rows say about every feature and phone. Travels between processes. int32 holds 12,000 hours of frames in one place."""

    rows: int
    """Labelled or not."""
    frames: np.ndarray
    """int64 [phones]: labelled frames of each, the same under shuffled labels."""
    high: np.ndarray
    """float32 [features]: largest value of all rows, labelled or not; -inf without rows."""
    first_bin: int
    """Of `table`; 0 without one."""
    table: np.ndarray
    """int32 [2, features, bins, phones]: of dense rows, by true and by shuffled label, `bins` from `first_bin` on; no bins for sparse rows."""
    cells: Cells
    """Of sparse rows, by true label."""
    shuffled: Cells
    """Of sparse rows, by shuffled label."""


class PhoneTally:
    """Counts of a shard while its blocks are gone through. Dense rows fill a table; of sparse rows the cells are kept as they come."""

    def __init__(self, n_features: int, n_phones: int) -> None:
        self.n_features, self.n_phones = n_features, n_phones
        self.rows = 0
        self.frames = np.zeros(n_phones, np.int64)
        self.low = np.float32(np.inf)
        """Of dense rows alone, of all features."""
        self.high = np.full(n_features, -np.inf, np.float32)
        self.table: np.ndarray | None = None
        """int32 [2, features, BINS, phones + 1], true and shuffled; made by the first dense block."""
        self.sparse: tuple[list[Cells], list[Cells]] = ([], [])


def count_block(block: Block, labels: PhoneLabels, tally: PhoneTally) -> None:
    """Adds a block's rows to a tally."""
    if not len(block.clip_of_row):
        return
    of_block = labels.of(block)
    tally.rows += len(block.clip_of_row)
    tally.frames += np.bincount(of_block.label[of_block.label >= 0], minlength=tally.n_phones)
    if block.dense is not None:
        if tally.table is None:
            tally.table = np.zeros((2, tally.n_features, BINS, tally.n_phones + 1), np.int32)
        count_dense(block.dense.view(np.uint32), of_block.label, of_block.shuffled, *tally.table)
        high = block.dense.max(axis=0) + np.float32(0)
        tally.low = min(tally.low, block.dense.min())
    else:
        for kept, label in zip(tally.sparse, (of_block.label, of_block.shuffled), strict=True):
            kept.append(_counted(sparse_cells(block.start, block.latent, block.value.view(np.uint32), label, tally.n_phones)))
        high = np.full(tally.n_features, -np.inf, np.float32)
        np.maximum.at(high, block.latent, block.value)
        has_zeros = np.bincount(block.latent, minlength=tally.n_features) < len(block.clip_of_row)
        high = np.where(has_zeros, np.maximum(high, 0), high)
    tally.high = np.maximum(tally.high, high)


def compact(tally: PhoneTally) -> PhoneCounts:
    """The counts of a tally, which is of no use afterwards."""
    if tally.table is None:
        first, table = 0, np.zeros((2, tally.n_features, 0, tally.n_phones), np.int32)
    else:
        first, last = bin_of(np.array([tally.low, tally.high.max()])).tolist()
        table = np.ascontiguousarray(tally.table[:, :, first : last + 1, : tally.n_phones])
    true, shuffled = (_joined(kept) for kept in tally.sparse)
    return PhoneCounts(tally.rows, tally.frames, tally.high, first, table, true, shuffled)


def count_shard(features: Features, store: ActivationStore, labels: PhoneLabels, shard: int) -> PhoneCounts:
    """One committed shard. Depends on nothing but its arguments."""
    tally = PhoneTally(features.count, len(labels.phones))
    for block in blocks(features, store, shard):
        count_block(block, labels, tally)
    return compact(tally)


def no_counts(n_features: int, n_phones: int) -> PhoneCounts:
    """The counts of no rows, which change nothing that they are merged with."""
    return compact(PhoneTally(n_features, n_phones))


def merge_counts(a: PhoneCounts, b: PhoneCounts) -> PhoneCounts:
    """The counts of the rows of both, of which they share none."""
    first_bin, table = _merged_tables(a, b)
    return PhoneCounts(
        rows=a.rows + b.rows,
        frames=a.frames + b.frames,
        high=np.maximum(a.high, b.high),
        first_bin=first_bin,
        table=table,
        cells=_merged(a.cells, b.cells),
        shuffled=_merged(a.shuffled, b.shuffled),
    )


def spread(counts: PhoneCounts, by_shuffled: bool = False) -> Iterator[tuple[slice, np.ndarray]]:
    """(features, their counts by phone and bin, int64 [features, phones, BINS], zeros too), CHUNK_FEATURES at a time."""
    n_features, n_phones = len(counts.high), len(counts.frames)
    cells, table = (counts.shuffled, counts.table[1]) if by_shuffled else (counts.cells, counts.table[0])
    in_table = slice(counts.first_bin, counts.first_bin + table.shape[1])
    for first in range(0, n_features, CHUNK_FEATURES):
        last = min(first + CHUNK_FEATURES, n_features)
        own = slice(*np.searchsorted(cells.cell, np.array([first, last]) * n_phones * BINS))
        dense = np.zeros((last - first, n_phones, BINS), np.int64)
        dense.reshape(-1)[cells.cell[own] - first * n_phones * BINS] = cells.frames[own]
        dense[..., in_table] += table[first:last].swapaxes(1, 2)
        dense[..., ZERO] = 0
        dense[..., ZERO] = counts.frames - dense.sum(axis=2)
        yield slice(first, last), dense


def _merged_tables(a: PhoneCounts, b: PhoneCounts) -> tuple[int, np.ndarray]:
    tables = [(counts.first_bin, counts.table) for counts in (a, b) if counts.table.shape[2]]
    if not tables:
        return a.first_bin, a.table
    first = min(first_bin for first_bin, _ in tables)
    stop = max(first_bin + table.shape[2] for first_bin, table in tables)
    merged = np.zeros((*a.table.shape[:2], stop - first, a.table.shape[3]), np.int32)
    for first_bin, table in tables:
        merged[:, :, first_bin - first : first_bin - first + table.shape[2]] += table
    return first, merged


def _counted(cells: np.ndarray) -> Cells:
    return Cells(*np.unique(cells, return_counts=True))


def _joined(parts: Iterable[Cells]) -> Cells:
    return reduce(_merged, parts, Cells(np.zeros(0, np.int64), np.zeros(0, np.int64)))


def _merged(a: Cells, b: Cells) -> Cells:
    cell, frames = merge_cells(*a, *b)
    return Cells(cell.copy(), frames.copy())  # what is left over would travel too

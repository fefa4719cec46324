"""Which features are active in the same rows.

Counted in every row: each pair of its strongest features above zero, at most `among` of them (`strongest`). Counts are integers, so they do not
depend on who counted what. The counts of all pairs take 2 bytes x features^2: 19 MB for 3,072 features, 302 MB for 12,288, and three times that
while they are merged; so above `WIDEST` features they are made only on request.
"""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numba import njit

PARTNERS = 10
"""Partners of each feature where nothing else is asked for."""
WIDEST = 8192
"""Features up to which pairs are counted unasked: 134 MB of counts."""
HINT = 0.9
"""Times the smallest value that the row before kept: frames resemble each other, so this row's are most likely larger."""


class Pairs(NamedTuple):
    """Counts over some rows."""

    both: np.ndarray
    """uint32 [features * (features - 1) / 2]: rows that count for a and b, a < b, at `pair(a, b, features)`; empty where nothing is counted."""
    active: np.ndarray
    """int64 [features]: rows that count for a."""
    cut: int
    """Rows with more than `among` features above zero: they count for the strongest alone."""

    def merge(self, other: "Pairs") -> "Pairs":
        """Of the rows of both."""
        counted = [part.both for part in (self, other) if len(part.both)]
        both = np.add(*counted) if len(counted) == 2 else counted[0] if counted else self.both
        return Pairs(both, self.active + other.active, self.cut + other.cut)


def no_pairs(features: int) -> Pairs:
    """Nothing counted."""
    return Pairs(np.zeros(0, np.uint32), np.zeros(features, np.int64), 0)


class PairCounter:
    """Counts pairs, block by block, in place."""

    def __init__(self, features: int, among: int) -> None:
        self.among, self.cut = among, 0
        self.both, self.active = np.zeros(features * (features - 1) // 2, np.uint32), np.zeros(features, np.int64)

    def add_sparse(self, start: np.ndarray, latent: np.ndarray, value: np.ndarray) -> None:
        """The entries of row i are `start[i]:start[i + 1]` of latent (int32, ascending) and value (float32)."""
        self.cut += _count_sparse(start, latent, value, self.among, self.both, self.active)

    def add_dense(self, values: np.ndarray) -> None:
        """values: float32 [rows, features], finite."""
        self.cut += _count_dense(values, self.among, self.both, self.active)

    def pairs(self) -> Pairs:
        return Pairs(self.both, self.active, int(self.cut))


@njit(cache=True)
def pair(a, b, features):
    """Where the counts of the pair of features a < b are."""
    return a * (2 * features - a - 3) // 2 + b - 1


@njit(cache=True)
def strongest(feature, value, n, among):
    """Moves the `among` largest of the first n positive values, and their features, to the front, in the order in which they stand. Of equal
    values at the cut the first ones stay. Returns how many there are."""
    if n <= among:
        return n
    cut = np.partition(value[:n], n - among)[n - among]
    equal = among
    for i in range(n):
        equal -= value[i] > cut
    kept = 0
    for i in range(n):  # without a branch: which values are larger is hard to foresee
        v = value[i]
        feature[kept] = feature[i]
        value[kept] = v
        stays = (v == cut) & (equal > 0)
        equal -= stays
        kept += stays | (v > cut)
    return kept


@njit(cache=True)
def _count(feature, n, both, active):
    for i in range(n):
        active[feature[i]] += 1
        offset = pair(np.int64(feature[i]), 0, len(active))
        for j in range(i + 1, n):
            both[offset + feature[j]] += np.uint32(1)


@njit(cache=True)
def _count_sparse(start, latent, value, among, both, active):
    feature, strength, cut = np.empty(len(active), np.int32), np.empty(len(active), np.float32), 0
    for i in range(len(start) - 1):
        n = 0
        for entry in range(start[i], start[i + 1]):
            if value[entry] > 0:
                feature[n] = latent[entry]
                strength[n] = value[entry]
                n += 1
        cut += n > among
        _count(feature, strongest(feature, strength, n, among), both, active)
    return cut


@njit(cache=True)
def _count_dense(values, among, both, active):
    feature, strength, cut, low = np.empty(len(active), np.int32), np.empty(len(active), np.float32), 0, np.float32(0)
    for i in range(len(values)):
        n = _larger(values[i], low, feature, strength)
        if n <= among and low > 0:  # a guess too high
            n = _larger(values[i], np.float32(0), feature, strength)
        more = n > among
        cut += more
        n = strongest(feature, strength, n, among)
        low = np.float32(HINT) * strength[:n].min() if more else np.float32(0)
        _count(feature, n, both, active)
    return cut


@njit(cache=True)
def _larger(values, low, feature, strength):
    n = 0
    for j in range(len(values)):  # without a branch, again
        feature[n] = j
        n += values[j] > low
    for i in range(n):
        strength[i] = values[feature[i]]
    return n


@njit(cache=True)
def _partners(both, active, partners):
    """Of every feature the others with the largest jaccard, best first: int64 [features, partners], -1 where there are no more, and counts."""
    features = len(active)
    other, count = np.full((features, partners), -1, np.int64), np.zeros((features, partners), np.int64)
    best = np.zeros(partners)
    for a in range(features):
        best[:] = 0
        for b in range(features):
            n = np.int64(both[pair(min(a, b), max(a, b), features)]) if a != b else 0
            jaccard = n / (active[a] + active[b] - n) if n else 0.0
            j = partners - 1
            if not jaccard > best[j]:
                continue
            while j > 0 and best[j - 1] < jaccard:
                best[j], other[a, j], count[a, j] = best[j - 1], other[a, j - 1], count[a, j - 1]
                j -= 1
            best[j], other[a, j], count[a, j] = jaccard, b, n
    return other, count


def coactivation_table(pairs: Pairs, rows: int, partners: int) -> pa.Table:
    """The columns of `coactivation.parquet`: of every feature its `partners` with the largest jaccard; of equal ones the first. rows: scanned."""
    if len(pairs.both):
        other, count = _partners(pairs.both, pairs.active, partners)
    else:
        other = count = np.full((len(pairs.active), 0), -1)
    feature, rank = np.nonzero(other >= 0)
    other, both = other[feature, rank], count[feature, rank]
    one, two = pairs.active[feature], pairs.active[other]
    return pa.table(
        {
            "feature": pa.array(feature, pa.int32()),
            "rank": pa.array(rank, pa.int32()),
            "other": pa.array(other, pa.int32()),
            "both": pa.array(both, pa.int64()),
            "jaccard": pa.array(both / (one + two - both), pa.float64()),
            "lift": pa.array(both.astype(np.float64) * rows / (one.astype(np.float64) * two), pa.float64()),
        }
    )

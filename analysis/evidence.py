"""Phone evidence in a scan's folder: measuring it, writing it, reading it. `docs/phones.md` says what the figures mean.

**phone_scores.parquet**, one row a feature, sorted: what `analysis.phone_scores.Scores` has, `_lo` and `_hi` the ends of a 95 % interval.
**phone_auc.parquet**: `feature`, `kind` (phone or class), `phone` (the class's name where kind is class), `frames`, `auc`, `auc_shuffled`.
**phone_counts.parquet**: `feature`, `phone`, `lo`, `hi`, `frames`: how many labelled frames of the phone have a value in that bin; zeros
have lo = hi = 0. **phone_ranges.parquet**: `feature`, `range`, `lo`, `hi`, `phone`, `frames`: the same for equally wide ranges from 0 to the
feature's maximum. Sorted; where frames would be 0 there is no row.
"""

from collections.abc import Callable
from functools import cached_property, partial, reduce
from itertools import pairwise
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from analysis.features import Features
from analysis.phone_counts import PhoneCounts, count_shard, merge_counts, spread
from analysis.phone_details import PhoneDetails, Targets, detail_shard, merge_details
from analysis.phone_kernels import RANGES, bin_lo_hi
from analysis.phone_labels import PhoneLabels
from analysis.phone_scores import CLASS_NAMES, AucTable, Scores, auc_table, scores, targets
from analysis.scan_folder import FEATURES_PER_GROUP, PHONE_FILES, Scan, remove
from cache.errors import HearsaeError
from cache.location import Location, arrow_input, location, put
from cache.store import ActivationStore

COUNTS, RANGE_COUNTS, AUC, SCORES = PHONE_FILES
WITH_INTERVAL = ("auc", "f1", "pmi", "selectivity", "onset_ms", "class_auc", "polysemanticity")
COLUMNS = (
    "auc", "auc_active", "auc_shuffled", "p_value", "f1", "precision", "recall", "threshold", "pmi", "selectivity", "onset_ms",
    "phone_class", "class_auc", "polysemanticity", "phones_at_top",
)  # fmt: skip
"""Of phone_scores.parquet, after `feature` and `phone`."""

Result = TypeVar("Result")


class ReduceShards(Protocol):
    """merge(function(shard), ...) over all shards of a store."""

    def __call__(self, function: Callable[[int], Result], merge: Callable[[Result, Result], Result]) -> Result: ...


class PhoneMix(NamedTuple):
    """What is said while a feature's activation is in each of equally wide ranges: the data of the stacked chart."""

    edges: np.ndarray
    """float64 [ranges + 1], from 0 to the maximum; the last range includes it."""
    phones: tuple[str, ...]
    """All of the store's, sorted."""
    frames: np.ndarray
    """int64 [ranges, phones]"""
    base: np.ndarray
    """float64 [phones]: each phone's share of all labelled frames."""


# Measuring


def measure(
    features: Features,
    store: ActivationStore,
    labels: PhoneLabels,
    out: str | Location,
    counts: PhoneCounts | None = None,
    reduce_shards: ReduceShards | None = None,
) -> None:
    """Goes over a store's committed rows, twice or, with the first pass's `counts` at hand, once, and writes the four files into `out`.

    reduce_shards: default: in this process, one shard after the other. Raises HearsaeError for a site on the token axis, where no
    frame has a label, and where shards were added between the passes.
    """
    if store.sites[features.site]["axis"] != "frame":
        raise HearsaeError(f"{features.site} has tokens, not frames: phones can be compared with encoder sites only")
    over = reduce_shards or _in_this_process(store, features.site)
    if counts is None:
        counts = over(partial(count_shard, features, store, labels), merge_counts)
    if not counts.frames.sum():
        raise HearsaeError(f"no frame of {features.site} in {store.path} lies in a phone: run 'hearsae align' on it again")
    table = auc_table(counts, labels.phones)
    sought = targets(counts, table)
    details = over(partial(detail_shard, features, store, labels, sought), merge_details)
    if not np.array_equal(details.frames.sum(axis=0), counts.frames):
        raise HearsaeError(f"{store.path} changed while it was scanned: run 'hearsae scan' again once nothing writes to it")
    write(counts, table, sought, details, location(out))


def _in_this_process(store: ActivationStore, site: str) -> ReduceShards:
    def over(function: Callable[[int], Result], merge: Callable[[Result, Result], Result]) -> Result:
        return reduce(merge, map(function, store.committed(site)))

    return over


# Writing


def write(counts: PhoneCounts, table: AucTable, sought: Targets, details: PhoneDetails, out: Location) -> None:
    """Writes the four files, each atomically, phone_scores.parquet last. Raises StoreError if the place is full or read-only."""
    remove(out, PHONE_FILES[::-1])  # without phone_scores.parquet there are none
    phones = table.names[: table.n_phones]
    put(out / COUNTS, _counts_file(counts, phones))
    put(out / RANGE_COUNTS, _grouped(_range_table(details, sought, phones)))
    put(out / AUC, _grouped(_auc_columns(table)))
    sink = pa.BufferOutputStream()
    pq.write_table(score_table(scores(table, sought, details), phones), sink, compression="zstd")
    put(out / SCORES, memoryview(sink.getvalue()))


def score_table(found: Scores, phones: tuple[str, ...]) -> pa.Table:
    """The columns of phone_scores.parquet; what is NaN becomes null."""
    columns = {"feature": pa.array(np.arange(len(found.phone)), pa.int32()), "phone": _names(found.phone, phones)}
    for name in COLUMNS:
        values = getattr(found, name)
        if name == "phone_class":
            columns[name] = _names(values, CLASS_NAMES)
        elif name in WITH_INTERVAL:
            columns |= {f"{name}{end}": _nullable(values[:, i]) for i, end in enumerate(("", "_lo", "_hi"))}
        else:
            columns[name] = _nullable(values)
    return pa.table(columns)


def _names(index: np.ndarray, names: tuple[str, ...]) -> pa.Array:
    return pa.array([names[i] if i >= 0 else None for i in index.tolist()], pa.string())


def _nullable(values: np.ndarray) -> pa.Array:
    return pa.array(values, pa.float64(), mask=np.isnan(values))


def _auc_columns(table: AucTable) -> pa.Table:
    n_features, n_names = table.auc.shape
    kind = ["phone"] * table.n_phones + ["class"] * (n_names - table.n_phones)
    return pa.table(
        {
            "feature": pa.array(np.repeat(np.arange(n_features), n_names), pa.int32()),
            "kind": pa.array(np.tile(np.array(kind, object), n_features), pa.string()),
            "phone": pa.array(np.tile(np.array(table.names, object), n_features), pa.string()),
            "frames": pa.array(np.tile(table.frames, n_features), pa.int64()),
            "auc": _nullable(table.auc.ravel()),
            "auc_shuffled": _nullable(table.shuffled.ravel()),
        }
    )


def _range_table(details: PhoneDetails, sought: Targets, phones: tuple[str, ...]) -> pa.Table:
    feature, range_, phone = np.nonzero(details.ranges)
    high = sought.high.astype(np.float64)[feature]
    return pa.table(
        {
            "feature": pa.array(feature, pa.int32()),
            "range": pa.array(range_, pa.int32()),
            "lo": pa.array(high * range_ / RANGES, pa.float64()),
            "hi": pa.array(high * (range_ + 1) / RANGES, pa.float64()),
            "phone": pa.array(np.array(phones, object)[phone], pa.string()),
            "frames": pa.array(details.ranges[feature, range_, phone], pa.int64()),
        }
    )


def _counts_file(counts: PhoneCounts, phones: tuple[str, ...]) -> memoryview:
    types = {"feature": pa.int32(), "phone": pa.string(), "lo": pa.float32(), "hi": pa.float32(), "frames": pa.int64()}
    lo, hi = bin_lo_hi()
    names = np.array(phones, object)
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, pa.schema(types), compression="zstd") as writer:
        for some, by_phone in spread(counts):
            feature, phone, bin_ = np.nonzero(by_phone)
            columns = (some.start + feature, names[phone], lo[bin_], hi[bin_], by_phone[feature, phone, bin_])
            arrays = {name: pa.array(values, kind) for (name, kind), values in zip(types.items(), columns, strict=True)}
            writer.write_table(pa.table(arrays), row_group_size=max(1, len(feature)))
    return memoryview(sink.getvalue())


def _grouped(table: pa.Table) -> memoryview:
    """A Parquet file whose row groups hold FEATURES_PER_GROUP features each, none of them in two."""
    feature = table["feature"].to_numpy()
    cuts = np.searchsorted(feature, np.arange(0, (feature[-1] if len(feature) else 0) + FEATURES_PER_GROUP + 1, FEATURES_PER_GROUP))
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, table.schema, compression="zstd") as writer:
        for start, stop in pairwise(cuts.tolist()):
            if stop > start:
                writer.write_table(table.slice(start, stop - start), row_group_size=stop - start)
    return memoryview(sink.getvalue())


# Reading


class PhoneEvidence:
    """The phone evidence of a scan, for reading. `PhoneEvidence.open(scan)`."""

    def __init__(self, scan: Scan) -> None:
        """Use `open`."""
        self.scan = scan
        self._files: dict[str, pq.ParquetFile] = {}
        self._last: dict[str, tuple[list[int], pa.Table]] = {}
        """Of each file that is read by feature, the row groups read last: neighbouring features share them."""

    @classmethod
    def open(cls, scan: Scan) -> "PhoneEvidence":
        """Raises HearsaeError where the scan has no phones."""
        if not cls.exists(scan):
            raise HearsaeError(f"the scan {scan.path} has no phones: run 'hearsae align' on its store, then 'hearsae scan' again")
        return cls(scan)

    @staticmethod
    def exists(scan: Scan) -> bool:
        """Whether the scan has phones."""
        return (scan.path / SCORES).exists()

    @cached_property
    def scores(self) -> pa.Table:
        """phone_scores.parquet, whole."""
        table = self._read(SCORES)
        if table.num_rows != self.scan.info["count"] or not {"feature", "phone", *COLUMNS} <= set(table.column_names):
            raise HearsaeError(f"{self.scan.path / SCORES} is not of this scan: run 'hearsae scan' again")
        return table

    @cached_property
    def auc(self) -> pa.Table:
        """phone_auc.parquet, whole."""
        return self._read(AUC)

    @cached_property
    def base(self) -> dict[str, int]:
        """Frames of every phone, sorted by phone."""
        rows = self._of_feature(AUC, 0).to_pylist()
        return {row["phone"]: row["frames"] for row in rows if row["kind"] == "phone"}

    def counts(self, feature: int) -> pa.Table:
        """One feature's rows of phone_counts.parquet. Raises HearsaeError for a feature that does not exist."""
        return self._of_feature(COUNTS, feature)

    def mix(self, feature: int) -> PhoneMix:
        """Which phones are said while the feature is in each of RANGES equally wide ranges. Raises HearsaeError for one that does not exist."""
        rows = self._of_feature(RANGE_COUNTS, feature)
        phones = tuple(self.base)
        frames = np.zeros((RANGES, len(phones)), np.int64)
        place = {phone: i for i, phone in enumerate(phones)}
        frames[rows["range"].to_numpy(), [place[phone] for phone in rows["phone"].to_pylist()]] = rows["frames"].to_numpy()
        high = max(0.0, float(self.scan.features["max"][feature].as_py()))
        base = np.array(list(self.base.values()), np.float64)
        return PhoneMix(high * np.arange(RANGES + 1) / RANGES, phones, frames, base / base.sum())

    def _read(self, name: str) -> pa.Table:
        try:
            return pq.read_table(arrow_input(self.scan.path / name))
        except (OSError, pa.ArrowException) as error:
            raise HearsaeError(f"{self.scan.path / name} can't be read ({error}): run 'hearsae scan' again") from error

    def _of_feature(self, name: str, feature: int) -> pa.Table:
        self.scan.check(feature)
        path = self.scan.path / name
        try:
            file = self._file(name)
            groups = [file.metadata.row_group(i).column(0).statistics for i in range(file.metadata.num_row_groups)]
            wanted = [i for i, group in enumerate(groups) if group.min <= feature <= group.max]
            if name not in self._last or self._last[name][0] != wanted:
                self._last[name] = (wanted, file.read_row_groups(wanted))
        except (OSError, pa.ArrowException) as error:
            raise HearsaeError(f"{path} can't be read ({error}): run 'hearsae scan' again") from error
        _, table = self._last[name]
        start, stop = np.searchsorted(table["feature"].to_numpy(), [feature, feature + 1])
        return table.slice(start, stop - start)

    def _file(self, name: str) -> pq.ParquetFile:
        if name not in self._files:
            self._files[name] = pq.ParquetFile(arrow_input(self.scan.path / name))
        return self._files[name]

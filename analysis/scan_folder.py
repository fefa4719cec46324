"""The folder that a scan leaves: `features.parquet`, `examples.parquet`, `coactivation.parquet`, and `scan.json`, which is written last and
says what they are. `docs/scan.md` describes every column.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from analysis.grid import BINS, FRACTION_BITS, MAGNITUDES, bin_edges
from cache.errors import HearsaeError
from cache.header import software
from cache.location import Location, arrow_input, location, put
from cache.store import ActivationStore

if TYPE_CHECKING:  # readers of a scan load neither torch nor numba
    from analysis.features import Features
    from analysis.scan import Runs, ShardScan

FORMAT = 2
SCAN, FEATURES, EXAMPLES, COACTIVATION = "scan.json", "features.parquet", "examples.parquet", "coactivation.parquet"
PHONE_FILES = ("phone_counts.parquet", "phone_ranges.parquet", "phone_auc.parquet", "phone_scores.parquet")
"""Of `analysis.evidence`, where the store had timings; in the order in which they are written."""
INFO = {"store": str, "features": str, "site": str, "axis": str, "count": int, "rows": int, "options": dict, "model": dict}
"""What readers take from scan.json."""
KINDS = ("bottom", "quantile", "range", "top")
"""Of examples, in the order in which they are sorted."""
FEATURES_PER_GROUP = 64
"""Features whose examples share a row group of examples.parquet: what reading one feature's examples has to decode."""


class Scan:
    """A scan folder, for reading. `Scan.open(folder)`."""

    def __init__(self, path: Location, info: dict[str, Any]) -> None:
        """Use `open`."""
        self.path = path
        self.info = info

    @classmethod
    def open(cls, path: str | Location) -> "Scan":
        """Raises HearsaeError if there is no scan at `path`, or one of another format."""
        path = location(path)
        try:
            info = json.loads((path / SCAN).read_bytes())
            found = info["format"]
        except (FileNotFoundError, NotADirectoryError):
            raise HearsaeError(f"there is no scan at {path}: make one with 'hearsae scan'") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise HearsaeError(f"{path / SCAN} is damaged ({error}): run 'hearsae scan' again") from error
        if found != FORMAT:
            raise HearsaeError(f"{path} has scan format {found}; this hearsae reads format {FORMAT}: scan it again")
        wrong = [name for name, kind in INFO.items() if not isinstance(info.get(name), kind)]
        if wrong or "sha256" not in info["model"] or "seed" not in info["options"]:
            raise HearsaeError(f"{path / SCAN} is damaged ({', '.join(wrong) or 'model or options'}): run 'hearsae scan' again")
        return cls(path, info)

    @cached_property
    def features(self) -> pa.Table:
        """`features.parquet`, whole."""
        table = self._whole(FEATURES)
        if table.num_rows != self.info["count"] or not {"density", "mean", "std", "hist_count"} <= set(table.column_names):
            raise HearsaeError(f"{self.path / FEATURES} is not of this scan: run 'hearsae scan' again")
        return table

    @cached_property
    def coactivation(self) -> pa.Table:
        """`coactivation.parquet`, whole; without rows where the scan counted no pairs."""
        table = self._whole(COACTIVATION)
        if not {"feature", "rank", "other", "both", "jaccard", "lift"} <= set(table.column_names):
            raise HearsaeError(f"{self.path / COACTIVATION} is not of this scan: run 'hearsae scan' again")
        return table

    def _whole(self, name: str) -> pa.Table:
        try:
            return pq.read_table(arrow_input(self.path / name))
        except (OSError, pa.ArrowException) as error:
            raise HearsaeError(f"{self.path / name} can't be read ({error}): run 'hearsae scan' again") from error

    def examples(self, feature: int) -> pa.Table:
        """One feature's rows of `examples.parquet`; decodes one row group. Raises HearsaeError for a feature that does not exist."""
        self.check(feature)
        first, last = self._groups
        try:
            table = self._examples_file.read_row_groups(np.flatnonzero((first <= feature) & (feature <= last)).tolist())
        except (OSError, pa.ArrowException) as error:
            raise HearsaeError(f"{self.path / EXAMPLES} can't be read ({error}): run 'hearsae scan' again") from error
        start, stop = np.searchsorted(table["feature"].to_numpy(), [feature, feature + 1])
        return table.slice(start, stop - start)

    def all_examples(self) -> pa.Table:
        """`examples.parquet`, whole, with kinds and texts as dictionaries. For all features: `examples` would decode each row group for every one."""
        try:
            table = pq.read_table(arrow_input(self.path / EXAMPLES), read_dictionary=["kind", "text"])
        except (OSError, pa.ArrowException) as error:
            raise HearsaeError(f"{self.path / EXAMPLES} can't be read ({error}): run 'hearsae scan' again") from error
        check_examples(self.path, table.column_names)
        return table

    def check(self, feature: int) -> None:
        """Raises HearsaeError for a feature that does not exist."""
        if not 0 <= feature < self.info["count"]:
            raise HearsaeError(
                f"there is no feature {feature} in {self.path}: it has features 0 to {self.info['count'] - 1} of {self.info['features']}"
            )

    @cached_property
    def _examples_file(self) -> pq.ParquetFile:
        try:
            file = pq.ParquetFile(arrow_input(self.path / EXAMPLES))
        except (OSError, pa.ArrowException) as error:
            raise HearsaeError(f"{self.path / EXAMPLES} can't be read ({error}): run 'hearsae scan' again") from error
        check_examples(self.path, file.schema_arrow.names)
        return file

    @cached_property
    def _groups(self) -> tuple[np.ndarray, np.ndarray]:
        """First and last feature of each row group."""
        metadata = self._examples_file.metadata
        statistics = [metadata.row_group(i).column(0).statistics for i in range(metadata.num_row_groups)]
        return np.array([s.min for s in statistics], np.int64), np.array([s.max for s in statistics], np.int64)


def check_examples(path: Location, columns: Sequence[str]) -> None:
    """Raises HearsaeError if these are not the columns of `examples.parquet`."""
    if columns[:1] != ["feature"] or not {"kind", "rank", "value", "clip", "frame", "text"} <= set(columns):
        raise HearsaeError(f"{path / EXAMPLES} is not of a scan: run 'hearsae scan' again")


# Writing


def refuse_other_folder(out: Location) -> None:
    """Raises HearsaeError if `out` can't become a scan folder: it is a file, or holds other things."""
    try:
        names = {entry.name for entry in out.iterdir() if not entry.name.startswith(".")} if out.exists() else set()
    except OSError as error:
        raise HearsaeError(f"can't use {out} as the scan's folder: {error.strerror}") from error
    if SCAN not in names and names - {FEATURES, EXAMPLES, COACTIVATION, *PHONE_FILES}:
        raise HearsaeError(f"{out} holds other things and is no scan: choose an empty or new folder")


def forget_scan(out: Location) -> None:
    """Makes a folder no scan any more, until another one has been written; an earlier one's phones are gone."""
    remove(out, (SCAN, *reversed(PHONE_FILES)))


def remove(out: Location, names: Sequence[str]) -> None:
    """Takes files out of a folder, in this order. Raises HearsaeError where that is not allowed."""
    try:
        for name in names:
            (out / name).unlink(missing_ok=True)
    except OSError as error:
        raise HearsaeError(f"can't write {out}: {error.strerror}") from error


def write_scan(merged: "ShardScan", store: ActivationStore, features: "Features", out: Location) -> None:
    """Writes the four files, each atomically, `scan.json` last. Raises StoreError if the place is full or read-only."""
    from analysis.coactivation import coactivation_table

    table = feature_table(merged)
    examples = example_table(merged, table, store, store.sites[features.site]["axis"])
    pairs = coactivation_table(merged.pairs, merged.rows, merged.options.partners(features.count))
    info = {
        "format": FORMAT,
        "store": str(store.path.absolute()),
        "features": features.spec,
        "site": features.site,
        "axis": store.sites[features.site]["axis"],
        "count": features.count,
        "rows": merged.rows,
        "shards": len(merged.shards),
        "coactive_rows_cut": merged.pairs.cut,
        "options": asdict(merged.options),
        "model": store.header.model,
        "software": software(),
    }
    put(out / FEATURES, _parquet(table))
    put(out / EXAMPLES, _parquet(examples, FEATURES_PER_GROUP))
    put(out / COACTIVATION, _parquet(pairs))
    put(out / SCAN, json.dumps(info, indent=1).encode())


def _parquet(table: pa.Table, features_per_group: int | None = None) -> memoryview:
    """A Parquet file; with `features_per_group` a row group holds that many features, none of them in two."""
    sink = pa.BufferOutputStream()
    # Without Arrow's own schema: a dictionary in memory is a plain column to whoever reads the file.
    with pq.ParquetWriter(sink, table.schema, compression="zstd", store_schema=False) as writer:
        if features_per_group is None:
            writer.write_table(table)
        else:
            group = table["feature"].to_numpy() // features_per_group
            cuts = [0, *(np.flatnonzero(np.diff(group)) + 1).tolist(), len(group)]
            for start, stop in pairwise(cuts):
                if stop > start:
                    writer.write_table(table.slice(start, stop - start), row_group_size=stop - start)
    return memoryview(sink.getvalue())


# features.parquet


def feature_table(merged: "ShardScan") -> pa.Table:
    """The columns of `features.parquet`."""
    n, options, moments = merged.rows, merged.options, merged.moments
    count = len(moments.low)
    feature, bin_ = np.divmod(merged.bins.keys, BINS)
    positive = bin_ >= MAGNITUDES
    active = np.zeros(count, np.int64)
    np.add.at(active, feature[positive], merged.bins.counts[positive])
    unit = 1 << FRACTION_BITS
    # Python divides integers of any length with one rounding.
    sums, squares, positive_sums = moments.total
    variance = [max(0, n * square * unit - total * total) / (n * unit) ** 2 for total, square in zip(sums, squares, strict=True)]
    mean_active = [total / (int(k) * unit) if k else None for total, k in zip(positive_sums, active, strict=True)]
    offsets = np.searchsorted(feature, np.arange(count + 1))
    edges = bin_edges()
    some = active > 0
    ranges = moments.high[some, None].astype(np.float64) * np.arange(options.ranges + 1) / options.ranges
    cuts = _quantile_cuts(feature[positive], bin_[positive], merged.bins.counts[positive], count, options.quantiles)

    return pa.table(
        {
            "feature": pa.array(np.arange(count), pa.int32()),
            "rows": pa.array(np.full(count, n), pa.int64()),
            "active": pa.array(active, pa.int64()),
            "density": pa.array(active / n, pa.float64()),
            "mean": pa.array([total / (n * unit) for total in sums], pa.float64()),
            "std": pa.array(np.sqrt(variance), pa.float64()),
            "mean_active": pa.array(mean_active, pa.float64()),
            "max": pa.array(moments.high, pa.float32()),
            "min": pa.array(moments.low, pa.float32()),
            **_run_columns(merged.runs),
            "hist_lo": _lists(offsets, edges[bin_]),
            "hist_hi": _lists(offsets, edges[bin_ + 1]),
            "hist_count": _lists(offsets, merged.bins.counts),
            "range_edges": _lists(np.cumsum([0, *some * (options.ranges + 1)]), ranges.ravel()),
            "quantile_edges": _lists(np.cumsum([0, *some * (options.quantiles + 1)]), edges[cuts].ravel()),
        }
    )


def _lists(offsets: np.ndarray, values: np.ndarray) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values))


def _run_columns(runs: "Runs") -> dict[str, pa.Array]:
    """Number of runs, mean and median of their frames, mean frames from start to peak and from there to the end; null without runs."""
    from analysis.kernels import LONGEST_RUN

    feature, length = np.divmod(runs.length.keys, LONGEST_RUN)
    before = np.concatenate([[0], np.cumsum(runs.length.counts)])  # runs of the features and lengths before
    first = before[np.searchsorted(feature, np.arange(len(runs.rise) + 1))]
    n, first = np.diff(first), first[:-1]
    none = n == 0
    frames = np.zeros(len(n), np.int64)
    np.add.at(frames, feature, length * runs.length.counts)

    def of_run(number: np.ndarray) -> np.ndarray:
        """Length of a feature's run of that number, by ascending length."""
        found = np.searchsorted(before, first + number, side="right") - 1
        return length[np.where(none, 0, found)] if len(length) else number

    def mean(values: np.ndarray) -> pa.Array:
        return pa.array(values / np.maximum(n, 1), pa.float64(), mask=none)

    median = (of_run((n - 1) // 2) + of_run(n // 2)) / 2
    return {
        "runs": pa.array(n, pa.int64()),
        "run_frames_mean": mean(frames),
        "run_frames_median": pa.array(median, pa.float64(), mask=none),
        "rise_frames_mean": mean(runs.rise),
        "fall_frames_mean": mean(runs.fall),
    }


def quantile_cuts(bins: np.ndarray, counts: np.ndarray, quantiles: int) -> np.ndarray:
    """The edges of the grid between which lie about equally many of the values.

    bins: int64, the non-empty ones, ascending. counts: int64. Returns int64 [quantiles + 1], edge numbers: edge e is the lower edge of bin e.
    Each is the edge, next to a non-empty bin, below which the count comes closest to its share; the lower of two as close.
    """
    below = np.concatenate([[0], np.cumsum(counts)])
    edge = np.append(bins, bins[-1] + 1)
    share = np.arange(quantiles + 1) * below[-1]
    return edge[np.abs(below[None, :] * quantiles - share[:, None]).argmin(axis=1)]


def _quantile_cuts(feature: np.ndarray, bins: np.ndarray, counts: np.ndarray, n_features: int, quantiles: int) -> np.ndarray:
    """int64 [features that have any, quantiles + 1]"""
    start = np.searchsorted(feature, np.arange(n_features + 1))
    cuts = [quantile_cuts(bins[a:b], counts[a:b], quantiles) for a, b in pairwise(start) if b > a]
    return np.stack(cuts) if cuts else np.zeros((0, quantiles + 1), np.int64)


# examples.parquet


def example_table(merged: "ShardScan", features: pa.Table, store: ActivationStore, axis: str) -> pa.Table:
    """The columns of `examples.parquet`. features: what `feature_table` gave."""
    parts = [_strongest("top", merged.top), _strongest("bottom", merged.bottom), _drawn_examples(merged, features)]
    column = {name: np.concatenate([part[name] for part in parts]) for name in ("feature", "kind", "bin", "rank", "value", "clip", "frame")}
    order = np.lexsort((column["rank"], column["bin"], column["kind"], column["feature"]))
    column = {name: values[order] for name, values in column.items()}
    clips = store.clips
    start_s = clips["start_s"].to_numpy()[column["clip"]] + store.header.frame_seconds * column["frame"]
    end_s = start_s + store.header.frame_seconds
    of_tokens = _token_columns(store, column["clip"], column["frame"]) if axis == "token" else {}
    text = pc.dictionary_encode(pc.coalesce(clips["text"], clips["source_text"]).combine_chunks())  # a clip's text is there once, not once an example
    return pa.table(
        {
            "feature": pa.array(column["feature"], pa.int32()),
            "kind": pa.array(np.array(KINDS, object)[column["kind"]], pa.string()),
            "bin": pa.array(column["bin"], pa.int32()),
            "rank": pa.array(column["rank"], pa.int32()),
            "value": pa.array(column["value"], pa.float32()),
            "clip": pa.array(column["clip"], pa.int64()),
            "frame": pa.array(column["frame"], pa.int32()),
            "start_s": pa.array(start_s, pa.float64()),
            "end_s": pa.array(end_s, pa.float64()),
            "text": pa.DictionaryArray.from_arrays(text.indices.take(pa.array(column["clip"], pa.int64())), text.dictionary),
            **of_tokens,
        }
    )


def _token_columns(store: ActivationStore, clip: np.ndarray, position: np.ndarray) -> dict[str, pa.Array]:
    """What is known of tokens: when they are said, what they are, which follow them, and where they are in the clip's transcript."""
    from analysis.tokens import tokens_of

    kinds = {"start_s": pa.float64(), "end_s": pa.float64(), "token": pa.string(), "next_token": pa.string()}
    kinds |= {"token_start": pa.int32(), "token_end": pa.int32()}
    columns: dict[str, list[Any]] = {name: [None] * len(clip) for name in kinds}
    order = np.argsort(clip, kind="stable")
    numbers, starts = np.unique(clip[order], return_index=True)
    for (_, tokens), members in zip(tokens_of(store, numbers.tolist()), np.split(order, starts[1:]), strict=True):
        for row, at in zip(members.tolist(), position[members].tolist(), strict=True):
            for name, value in tokens[at]._asdict().items():
                if name in columns:
                    columns[name][row] = value
            columns["next_token"][row] = tokens[at + 1].token if at + 1 < len(tokens) else None
    return {name: pa.array(columns[name], kind) for name, kind in kinds.items()}


def _strongest(kind: str, moments: np.ndarray) -> dict[str, np.ndarray]:
    feature, rank = np.nonzero(moments["clip"] >= 0)
    found = moments[feature, rank]
    value = -found["value"] if kind == "bottom" else found["value"]
    where = {"feature": feature, "kind": np.full(len(rank), KINDS.index(kind)), "bin": np.zeros_like(rank), "rank": rank}
    return where | {"value": value, "clip": found["clip"], "frame": found["frame"]}


def _drawn_examples(merged: "ShardScan", features: pa.Table) -> dict[str, np.ndarray]:
    from analysis.kernels import draw_examples

    options, candidates = merged.options, merged.candidates
    start = np.searchsorted(candidates["cell"], np.arange(len(merged.top) + 1) * MAGNITUDES)
    active = np.flatnonzero(np.diff(start))
    edges = {"range_edges": options.ranges + 1, "quantile_edges": options.quantiles + 1}
    ranges, quantiles = (features[name].combine_chunks().flatten().to_numpy().reshape(len(active), n) for name, n in edges.items())
    kinds = np.array([KINDS.index("range"), KINDS.index("quantile")])
    feature, kind, bin_, rank, index = draw_examples(candidates, start, active, ranges, quantiles, bin_edges()[MAGNITUDES:], kinds, options.per_bin)
    where = {"feature": feature, "kind": kind, "bin": bin_, "rank": rank}
    return where | {name: candidates[name][index] for name in ("value", "clip", "frame")}

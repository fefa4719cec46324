"""The folder that a scan leaves: `features.parquet`, `examples.parquet`, and `scan.json`, which is written last and says what they are.

**features.parquet**, one row a feature, sorted: `feature`; `rows` scanned; `active`, how many have a value > 0; `density`, their share;
`mean`, `std`, `min`, `max` over all rows; `mean_active` over the active ones (null without any); `hist_lo`, `hist_hi`, `hist_count`, the
non-empty bins of the value grid (`analysis.grid`), ascending; zeros are in none of them; `range_edges`, of equal width from 0 to `max`;
`quantile_edges`, grid edges between which lie about equally many active rows. Both edges are empty for a feature that is never active.

**examples.parquet**, sorted by (feature, kind, bin, rank): `feature`; `kind`, one of top, range, quantile; `bin`, 0 for top, else
ascending by value; `rank`, best first for top, else in the order of the draw; `value`; `clip`; `frame`, within the clip (a token's index on
the token axis); `start_s`, `end_s` within the clip's source (null on the token axis); `text` of the clip, else of its source. Only active
frames are examples; in a (feature, kind, bin) no clip comes twice. A range is half-open, [lo, hi), but the last one includes `max`.
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
    from analysis.scan import ShardScan

FORMAT = 1
SCAN, FEATURES, EXAMPLES = "scan.json", "features.parquet", "examples.parquet"
INFO = {"store": str, "features": str, "site": str, "axis": str, "count": int, "rows": int, "options": dict, "model": dict}
"""What readers take from scan.json."""
KINDS = ("quantile", "range", "top")
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
            raise HearsaeError(f"{path} has scan format {found}; this hearsae reads format {FORMAT}")
        wrong = [name for name, kind in INFO.items() if not isinstance(info.get(name), kind)]
        if wrong or "sha256" not in info["model"] or "seed" not in info["options"]:
            raise HearsaeError(f"{path / SCAN} is damaged ({', '.join(wrong) or 'model or options'}): run 'hearsae scan' again")
        return cls(path, info)

    @cached_property
    def features(self) -> pa.Table:
        """`features.parquet`, whole."""
        try:
            table = pq.read_table(arrow_input(self.path / FEATURES))
        except (OSError, pa.ArrowException) as error:
            raise HearsaeError(f"{self.path / FEATURES} can't be read ({error}): run 'hearsae scan' again") from error
        if table.num_rows != self.info["count"] or not {"density", "mean", "std", "hist_count"} <= set(table.column_names):
            raise HearsaeError(f"{self.path / FEATURES} is not of this scan: run 'hearsae scan' again")
        return table

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
    if SCAN not in names and names - {FEATURES, EXAMPLES}:
        raise HearsaeError(f"{out} holds other things and is no scan: choose an empty or new folder")


def write_scan(merged: "ShardScan", store: ActivationStore, features: "Features", out: Location) -> None:
    """Writes the three files, each atomically, `scan.json` last. Raises StoreError if the place is full or read-only."""
    table = feature_table(merged)
    examples = example_table(merged, table, store, store.sites[features.site]["axis"])
    info = {
        "format": FORMAT,
        "store": str(store.path.absolute()),
        "features": features.spec,
        "site": features.site,
        "axis": store.sites[features.site]["axis"],
        "count": features.count,
        "rows": merged.rows,
        "shards": len(merged.shards),
        "options": asdict(merged.options),
        "model": store.header.model,
        "software": software(),
    }
    try:
        (out / SCAN).unlink(missing_ok=True)  # until all three are there, this is no scan
    except OSError as error:
        raise HearsaeError(f"can't write {out}: {error.strerror}") from error
    put(out / FEATURES, _parquet(table))
    put(out / EXAMPLES, _parquet(examples, FEATURES_PER_GROUP))
    put(out / SCAN, json.dumps(info, indent=1).encode())


def _parquet(table: pa.Table, features_per_group: int | None = None) -> memoryview:
    """A Parquet file; with `features_per_group` a row group holds that many features, none of them in two."""
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, table.schema, compression="zstd") as writer:
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
    n, options, count = merged.rows, merged.options, len(merged.low)
    feature, bin_ = merged.bins // BINS, merged.bins % BINS
    positive = bin_ >= MAGNITUDES
    active = np.zeros(count, np.int64)
    np.add.at(active, feature[positive], merged.bin_counts[positive])
    unit = 1 << FRACTION_BITS
    # Python divides integers of any length with one rounding.
    variance = [max(0, n * squares * unit - total * total) / (n * unit) ** 2 for total, squares in zip(merged.total[0], merged.total[1], strict=True)]
    mean_active = [total / (int(k) * unit) if k else None for total, k in zip(merged.total[2], active, strict=True)]
    offsets = pa.array(np.searchsorted(feature, np.arange(count + 1)), pa.int32())
    edges = bin_edges()

    def histogram(values: np.ndarray) -> pa.Array:
        return pa.ListArray.from_arrays(offsets, pa.array(values))

    ranges = [_range_edges(float(high), options.ranges) if k else [] for high, k in zip(merged.high, active, strict=True)]
    cuts = _quantile_cuts(feature[positive], bin_[positive], merged.bin_counts[positive], count, options.quantiles)
    return pa.table(
        {
            "feature": pa.array(np.arange(count), pa.int32()),
            "rows": pa.array(np.full(count, n), pa.int64()),
            "active": pa.array(active, pa.int64()),
            "density": pa.array(active / n, pa.float64()),
            "mean": pa.array([total / (n * unit) for total in merged.total[0]], pa.float64()),
            "std": pa.array(np.sqrt(variance), pa.float64()),
            "mean_active": pa.array(mean_active, pa.float64()),
            "max": pa.array(merged.high, pa.float32()),
            "min": pa.array(merged.low, pa.float32()),
            "hist_lo": histogram(edges[bin_]),
            "hist_hi": histogram(edges[bin_ + 1]),
            "hist_count": histogram(merged.bin_counts),
            "range_edges": pa.array(ranges, pa.list_(pa.float64())),
            "quantile_edges": pa.array([edges[cut].tolist() for cut in cuts], pa.list_(pa.float64())),
        }
    )


def _range_edges(high: float, ranges: int) -> list[float]:
    return [high * i / ranges for i in range(ranges + 1)]


def quantile_cuts(bins: np.ndarray, counts: np.ndarray, quantiles: int) -> np.ndarray:
    """The edges of the grid between which lie about equally many of the values.

    bins: int64, the non-empty ones, ascending. counts: int64. Returns int64 [quantiles + 1], edge numbers: edge e is the lower edge of bin e.
    Each is the edge, next to a non-empty bin, below which the count comes closest to its share; the lower of two as close.
    """
    below = np.concatenate([[0], np.cumsum(counts)])
    edge = np.append(bins, bins[-1] + 1)
    share = np.arange(quantiles + 1) * below[-1]
    return edge[np.abs(below[None, :] * quantiles - share[:, None]).argmin(axis=1)]


def _quantile_cuts(feature: np.ndarray, bins: np.ndarray, counts: np.ndarray, n_features: int, quantiles: int) -> list[np.ndarray]:
    start = np.searchsorted(feature, np.arange(n_features + 1))
    none = np.zeros(0, np.int64)
    return [quantile_cuts(bins[a:b], counts[a:b], quantiles) if b > a else none for a, b in pairwise(start)]


# examples.parquet


def example_table(merged: "ShardScan", features: pa.Table, store: ActivationStore, axis: str) -> pa.Table:
    """The columns of `examples.parquet`. features: what `feature_table` gave."""
    parts = [_top_examples(merged.top), *_drawn_examples(merged, features)]
    column = {name: np.concatenate([part[name] for part in parts]) for name in ("feature", "kind", "bin", "rank", "value", "clip", "frame")}
    order = np.lexsort((column["rank"], column["bin"], column["kind"], column["feature"]))
    column = {name: values[order] for name, values in column.items()}
    clips = store.clips
    start_s = clips["start_s"].to_numpy()[column["clip"]] + store.header.frame_seconds * column["frame"]
    no_time = np.full(len(start_s), axis == "token")
    text = pc.coalesce(clips["text"], clips["source_text"]).take(pa.array(column["clip"], pa.int64())).combine_chunks()
    return pa.table(
        {
            "feature": pa.array(column["feature"], pa.int32()),
            "kind": pa.array(np.array(KINDS, object)[column["kind"]], pa.string()),
            "bin": pa.array(column["bin"], pa.int32()),
            "rank": pa.array(column["rank"], pa.int32()),
            "value": pa.array(column["value"], pa.float32()),
            "clip": pa.array(column["clip"], pa.int64()),
            "frame": pa.array(column["frame"], pa.int32()),
            "start_s": pa.array(start_s, pa.float64(), mask=no_time),
            "end_s": pa.array(start_s + store.header.frame_seconds, pa.float64(), mask=no_time),
            "text": text,
        }
    )


def _top_examples(top: np.ndarray) -> dict[str, np.ndarray]:
    feature, rank = np.nonzero(top["clip"] >= 0)
    found = top[feature, rank]
    kind = np.full(len(rank), KINDS.index("top"))
    return {"feature": feature, "kind": kind, "bin": np.zeros_like(rank), "rank": rank} | {name: found[name] for name in ("value", "clip", "frame")}


def _drawn_examples(merged: "ShardScan", features: pa.Table) -> list[dict[str, np.ndarray]]:
    from analysis.kernels import draw

    found, options = merged.candidates, merged.options
    start = np.searchsorted(found["cell"], np.arange(len(merged.low) + 1) * MAGNITUDES)
    range_edges, quantile_edges = features["range_edges"].to_pylist(), features["quantile_edges"].to_pylist()
    grid, parts = bin_edges(), []
    for feature in np.flatnonzero(np.diff(start)):
        own = found[start[feature] : start[feature + 1]]
        own = own[np.lexsort((own["clip"], own["hash"]))]
        # A quantile's edges are those of the grid, so a value's fine bin decides, also where it lies beyond the grid.
        lower_edge = grid[MAGNITUDES + own["cell"] % MAGNITUDES]
        for kind, edges, value in (("range", range_edges, own["value"]), ("quantile", quantile_edges, lower_edge)):
            n_bins = len(edges[feature]) - 1
            # From the right: of bins with the same lower edge only the last one has any width.
            bins = np.clip(np.searchsorted(edges[feature], value, side="right") - 1, 0, n_bins - 1)
            taken = draw(bins, own["clip"], n_bins, options.per_bin)
            bin_, rank = np.nonzero(taken >= 0)
            drawn = own[taken[bin_, rank]]
            where = {"feature": np.full(len(rank), feature), "kind": np.full(len(rank), KINDS.index(kind)), "bin": bin_, "rank": rank}
            parts.append(where | {name: drawn[name] for name in ("value", "clip", "frame")})
    return parts

"""The features of a phone, from a scan's phone evidence: nothing is computed, one table is read."""

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from analysis.scan_folder import PHONE_FILES, Scan
from cache.errors import HearsaeError
from cache.location import arrow_input

_, _, AUC, _ = PHONE_FILES


def has_phone_table(scan: Scan) -> bool:
    """Whether the scan's store had timings, so that its folder has the table."""
    return (scan.path / AUC).is_file()


def phone_features(scan: Scan, phone: str, n: int = 10) -> list[dict[str, Any]]:
    """The `n` features that tell a phone, or an articulatory class, best from all other labelled frames, best first.

    Each as `feature, phone, kind, frames, auc, auc_shuffled, density, max`: kind is phone or class, `auc_shuffled` what the feature reaches for
    shuffled labels.
    Raises HearsaeError for a phone that no frame has, naming those that there are, and for a table that can't be read.
    """
    try:
        table = pq.read_table(arrow_input(scan.path / AUC))
        mine = table.filter(pc.equal(table["phone"], phone))
        if not mine.num_rows:
            there = sorted(pc.unique(table["phone"]).to_pylist())
            raise HearsaeError(f"{scan.path} knows no phone or class '{phone}': it has {', '.join(there)}")
        mine = mine.filter(pc.greater(mine["auc"], 0.5)).sort_by([("auc", "descending"), ("feature", "ascending")]).slice(0, n)
        rows = mine.select([c for c in ("feature", "phone", "kind", "frames", "auc", "auc_shuffled") if c in mine.column_names]).to_pylist()
    except (OSError, pa.ArrowException, KeyError) as error:
        raise HearsaeError(f"{scan.path / AUC} can't be read ({error}): run 'hearsae scan' again") from error
    scanned = scan.features.select(["density", "max"]).take(mine["feature"]).to_pylist()
    return [row | more for row, more in zip(rows, scanned, strict=True)]

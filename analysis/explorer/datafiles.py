"""The page's data: JavaScript files that register a value, so that the page can load them without a server."""

import base64
import json
import math
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SPARK_HEIGHTS = "0123456789abcdefghijklmnopqrstuvwxyz"


def write_data(folder: Path, name: str, value: Any) -> None:
    """Writes `folder/name.js`, which registers `value` as `name`. Names are ours; values may hold any text."""
    path = folder / f"{name}.js"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"hearsae.register({javascript(name)},{javascript(value)});\n", encoding="ascii")


def javascript(value: Any) -> str:
    """JSON that is safe wherever JavaScript may stand: ASCII only (so no U+2028), and no `<` that could end or open anything in HTML."""
    return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def numbers(values: Iterable[float | None], digits: int = 5) -> list[float | int | None]:
    """Rounded to significant digits for a page; null for what is missing or not finite."""
    rounded = (float(f"{value:.{digits}g}") if value is not None and math.isfinite(value) else None for value in values)
    return [int(value) if value is not None and value.is_integer() else value for value in rounded]


def pack(columns: Sequence[np.ndarray]) -> str:
    """Columns one after another, little-endian, deflated (zlib's format), base64. The widest types must come first, for alignment."""
    raw = b"".join(np.ascontiguousarray(column, column.dtype.newbyteorder("<")).tobytes() for column in columns)
    return base64.b64encode(zlib.compress(raw, 6)).decode("ascii")


class Histogram(NamedTuple):
    """Counts in bins of equal width."""

    lo: float
    """Lower edge of the first bin."""
    step: float
    counts: np.ndarray
    """int64 [bins]"""


def histogram(lo: np.ndarray, hi: np.ndarray, count: np.ndarray) -> Histogram:
    """The non-empty bins of the scan's value grid (`analysis.grid`) -> bins as wide as the widest of them, from 0 or below.

    Within an octave the grid's bins are equally wide and each octave's are twice as wide as the one's before, so they nest: no count is
    torn apart, and the larger side has 17 to 32 bins.
    """
    if not len(count):
        return Histogram(0.0, 1.0, np.zeros(1, np.int64))
    step = float((hi - lo).max())
    index = np.floor(lo / step).astype(np.int64)
    first = min(0, int(index[0]))
    counts = np.zeros(max(0, int(index[-1])) - first + 1, np.int64)
    np.add.at(counts, index - first, count.astype(np.int64))
    return Histogram(first * step, step, counts)


def sparkline(lo: np.ndarray, hi: np.ndarray, count: np.ndarray) -> str:
    """Log counts of the values above zero as one character a bin, `0` to `z`; a bin that holds anything is not `0`."""
    positive = lo >= 0
    height = np.log1p(histogram(lo[positive], hi[positive], count[positive]).counts)
    height *= (len(SPARK_HEIGHTS) - 1) / max(float(height.max()), 1e-9)
    return "".join(SPARK_HEIGHTS[max(1, round(level)) if level else 0] for level in height.tolist())

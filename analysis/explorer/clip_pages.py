"""A whole clip's page: its strongest features over time. And when each word and phone of the page's clips is spoken."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from analysis.explorer.clips import Clips
from analysis.explorer.datafiles import numbers, pack, write_data
from analysis.explorer.traces import LEVELS
from cache.store import ActivationStore
from cache.timings import has_timings, read_timings
from sae.models import Codes

STRIPS = 12
"""Features shown over a clip."""
MILLISECONDS = 1000


class Ranked(NamedTuple):
    """The features that a page holds, and what their strength is measured by."""

    feature: np.ndarray
    """int64 [features], ascending."""
    mean: np.ndarray
    """float64 [features], over the whole scan."""
    std: np.ndarray
    """float64 [features], of the population."""
    max: np.ndarray
    """float64 [features]"""

    @classmethod
    def of(cls, table: pa.Table) -> "Ranked":
        """table: rows of a scan's features.parquet."""
        return cls(table["feature"].to_numpy().astype(np.int64), *(table[name].to_numpy().astype(np.float64) for name in ("mean", "std", "max")))

    def strongest(self, peak: np.ndarray, n: int = STRIPS) -> tuple[np.ndarray, np.ndarray]:
        """Positions in `feature` of at most n features, and their strength: how many standard deviations above its mean in the scan a
        feature's greatest value in the clip lies. A share of the scan's maximum would not do: it is 1 for every feature that has its maximum
        in the clip, which is often more than n.

        peak: float [features], each feature's greatest value in the clip. Those that are nowhere above zero, or never vary, are left out.
        """
        is_shown = (peak > 0) & (self.std > 0)
        z = np.where(is_shown, (peak - self.mean) / np.where(self.std > 0, self.std, 1), -np.inf)
        order = np.argsort(-z, kind="stable")[:n]
        order = order[is_shown[order]]
        return order, z[order]


def write_clip_page(data: Path, name: str, ranked: Ranked, values: np.ndarray | Codes, n_rows: int) -> None:
    """Writes one clip's strips.

    name: of the data file. values: float32 [n_rows, all features], or the values that are not zero, of all rows of the clip.
    """
    at, z = ranked.strongest(_peaks(values, ranked.feature))
    strips = _columns(values, ranked.feature[at], n_rows)
    lo, hi = strips.min(axis=1), strips.max(axis=1)
    spread = np.where(hi > lo, hi - lo, 1)[:, None]
    columns: dict[str, Any] = {
        "frames": n_rows,
        "feature": ranked.feature[at].tolist(),
        "peak": strips.argmax(axis=1).tolist(),
        "levels": pack([np.rint((strips - lo[:, None]) / spread * LEVELS).astype(np.uint8)]),
    }
    for key, column in (("z", z), ("lo", lo), ("hi", hi), ("max", ranked.max[at])):
        columns[key] = numbers(column.tolist(), 7 if key in ("lo", "hi") else 4)
    write_data(data, name, columns)


def _peaks(values: np.ndarray | Codes, feature: np.ndarray) -> np.ndarray:
    """Each feature's greatest value: float32 [features]; 0 where no value is kept."""
    if isinstance(values, np.ndarray):
        return values.max(axis=0)[feature]
    peaks = np.zeros(1 + max(int(feature.max(initial=0)), int(values.latent.max(initial=0))), np.float32)
    np.maximum.at(peaks, values.latent, values.value)
    return peaks[feature]


def _columns(values: np.ndarray | Codes, feature: np.ndarray, n_rows: int) -> np.ndarray:
    """The values of a few features over the clip: float32 [features, n_rows]."""
    if isinstance(values, np.ndarray):
        return values[:, feature].T
    found = np.zeros((len(feature), n_rows), np.float32)
    for i, one in enumerate(feature):
        of_it = values.latent == one
        found[i, values.row[of_it]] = values.value[of_it]
    return found


# Words and phones


class Said(NamedTuple):
    """The intervals of c clips in the clips' own time, one after the other: those of clip i are `first[i]:first[i + 1]`."""

    first: np.ndarray
    """uint32 [c + 1]"""
    start_ms: np.ndarray
    """uint32 [n], from the clip's start."""
    end_ms: np.ndarray
    """uint32 [n]"""
    label: list[str]


def said_in(table: pa.Table, clips: np.ndarray, clip_start_s: np.ndarray) -> Said:
    """table: words or phones of `cache.timings.Timings`. clips: int64 [c]. clip_start_s: float64 [c], within the clips' sources.

    Intervals that begin before their clip begin with it.
    """
    of = table["clip"].to_numpy()
    starts, stops = np.searchsorted(of, clips), np.searchsorted(of, clips, side="right")
    rows = np.concatenate([np.zeros(0, np.int64), *(np.arange(start, stop) for start, stop in zip(starts, stops, strict=True))])
    offset = np.repeat(clip_start_s, stops - starts)
    start, end = ((table[name].to_numpy()[rows] - offset) * MILLISECONDS for name in ("start_s", "end_s"))
    first = np.concatenate([[0], np.cumsum(stops - starts)])
    start_ms, end_ms = (np.rint(np.maximum(0, time)).astype(np.uint32) for time in (start, end))
    return Said(first.astype(np.uint32), start_ms, end_ms, table["label"].take(rows).to_pylist())


def pack_said(clips: Clips) -> dict[str, Any] | None:
    """The words and phones of all clips of the page as `tiers.js` unpacks them; None where no store has any."""
    if not any(has_timings(store) for store in clips.stores):
        return None
    parts = [_said_of(store, of_store) for store, of_store in zip(clips.stores, clips.of_store, strict=True)]
    packed = {tier: [part[tier] for part in parts] for tier in ("words", "phones")}
    labels = {label: i for i, label in enumerate(dict.fromkeys(label for tier in packed.values() for part in tier for label in part.label))}
    return {"labels": list(labels)} | {tier: _pack_tier(of_stores, labels) for tier, of_stores in packed.items()}


def _said_of(store: ActivationStore, clips: np.ndarray) -> dict[str, Said]:
    if not has_timings(store):
        nothing = np.zeros(0, np.uint32)
        return dict.fromkeys(("words", "phones"), Said(np.zeros(len(clips) + 1, np.uint32), nothing, nothing, []))
    timings = read_timings(store)
    clip_start_s = store.clips["start_s"].to_numpy()[clips]
    return {"words": said_in(timings.words, clips, clip_start_s), "phones": said_in(timings.phones, clips, clip_start_s)}


def _pack_tier(of_stores: list[Said], labels: dict[str, int]) -> dict[str, Any]:
    """Columns of uint32: `first`; how much later than the interval before each starts (modulo 2^32, for the next clip's starts earlier); how
    long it lasts; its label's number. Differences are small and deflate better than times."""
    counts = np.concatenate([np.diff(one.first.astype(np.int64)) for one in of_stores])
    start_ms = np.concatenate([one.start_ms for one in of_stores])
    columns = [
        np.concatenate([[0], np.cumsum(counts)]).astype(np.uint32),
        np.diff(start_ms, prepend=np.uint32(0)),
        np.concatenate([one.end_ms for one in of_stores]) - start_ms,
        np.array([labels[label] for one in of_stores for label in one.label], np.uint32),
    ]
    return {"count": len(columns[1]), "columns": pack(columns)}

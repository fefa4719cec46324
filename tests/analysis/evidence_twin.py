"""Phone evidence written the plain way: loops over clips and frames, whole milliseconds, Python's own integers."""

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from conftest import fill_store, plan_of
from scan_twin import SITE

from analysis.features import Features
from analysis.phone_kernels import BINS, RANGES, bin_lo_hi
from analysis.phone_labels import PhoneLabels, rotation
from cache.store import ActivationStore

SECONDS = [0.5, 1.31, 0.8, 0.42, 2.6, 0.02, 1.9, 0.7, 3.1, 0.04, 1.2, 0.9]
PHONES = ("AE", "IY", "SIL", "T", "ZH")
LATE = 4
"""A source whose phones begin and end beside its clip's frames, and overlap none of the first half second."""


def timings(store: ActivationStore, seed: int = 0) -> pa.Table:
    """Phones of 10 to 120 ms for all sources but s3, some spelled with stress; the first begins late, and there are gaps."""
    rng = np.random.default_rng(seed)
    rows = []
    for clip, source in enumerate(store.clips["source"].to_pylist()):
        seconds = SECONDS[int(source[1:-4])]
        bounds = np.round((0.5 if source == f"s{LATE}.wav" else 0.017) + np.cumsum(rng.uniform(0.01, 0.12, 60)), 3)
        for start, end in pairwise(bounds[bounds < seconds + 0.2]):
            if source != "s3.wav" and rng.uniform() > 0.1:
                rows.append((clip, start, end, str(rng.choice(["AE1", "AE0", "IY2", "SIL", "T", "ZH"]))))
    return phone_table(rows)


def phone_table(rows: list[tuple[int, float, float, str]]) -> pa.Table:
    clip, start, end, label = zip(*rows, strict=True)
    return pa.table(
        {"clip": pa.array(clip, pa.int64()), "start_s": pa.array(start, pa.float64()), "end_s": pa.array(end, pa.float64()), "label": label}
    )


def made_up_store(path: Path, width: int = 8) -> ActivationStore:
    """12 clips in several shards, one of them skipped; many zeros and ties; column 1 never positive, column 2 never not."""
    rng = np.random.default_rng(1)

    def rows_of(site, clip, n):
        rows = rng.integers(-6, 9, (n, width)) / 3 * np.geomspace(0.5, 20, width)
        rows[:, 1] = -np.abs(rows[:, 1])
        rows[:, 2] = np.abs(rows[:, 2]) + 0.25
        return rows

    plan = plan_of(SECONDS, shard_rows=160, chunk_rows=32)
    skipped = {plan.clips["source"].to_pylist().index("s1.wav"): "unreadable"}
    return fill_store(path, plan, {SITE: width}, rows_of, skip=skipped)


class Clip(NamedTuple):
    number: int
    group: int
    values: np.ndarray
    """float32 [frames, features]"""
    labels: list[str | None]
    shuffled: list[str | None]
    phones: list[tuple[int, int, str]]
    """Start and end in milliseconds, label."""


def clips(store: ActivationStore, features: Features, table: pa.Table, labels: PhoneLabels) -> list[Clip]:
    found = []
    for shard in store.committed(features.site):
        for span in store.spans(shard, features.site):
            values = features.dense(store.read_clip(features.site, span.clip))
            rows = table.filter(pa.compute.equal(table["clip"], span.clip)).to_pylist()
            phones = [(round(row["start_s"] * 1000), round(row["end_s"] * 1000), row["label"].rstrip("012")) for row in rows]
            said: list[str | None] = []
            for frame in range(len(values)):
                inside = [phone for start, end, phone in phones if start <= 20 * frame + 10 < end]
                said.append(inside[0] if inside else None)
            turn = rotation(labels.seed, span.clip, len(values)) % len(values)
            found.append(Clip(span.clip, int(labels.group[span.clip]), values, said, said[len(said) - turn :] + said[: len(said) - turn], phones))
    return found


def bin_number(value: float) -> int:
    """By comparison with the edges."""
    if value == 0:
        return BINS // 2
    lo, hi = bin_lo_hi()
    inside = (lo <= value) & (value < hi) if value > 0 else (lo < value) & (value <= hi)
    return int(np.flatnonzero(inside)[0]) if inside.any() else (BINS - 1 if value > 0 else 0)


def counts(found: list[Clip], feature: int, shuffled: bool = False) -> Counter:
    """(phone, bin) -> frames."""
    counted: Counter = Counter()
    for clip in found:
        for value, label in zip(clip.values[:, feature], clip.shuffled if shuffled else clip.labels, strict=True):
            if label is not None:
                counted[label, bin_number(float(value))] += 1
    return counted


def auc(inside: list[float], outside: list[float]) -> float:
    a, b = np.array(inside)[:, None], np.array(outside)[None]
    return float(((a > b) + (a == b) / 2).mean())


class Detail(NamedTuple):
    detected: Counter
    """(group, what) -> frames"""
    latency: Counter
    """(group, milliseconds) -> occurrences"""
    ranges: Counter
    """(range, phone) -> frames"""
    strata: Counter
    """(group, top or lower, phone) -> frames"""


def detail(found: list[Clip], feature: int, phone: str, threshold: float, high: float, top_from: float) -> Detail:
    out = Detail(Counter(), Counter(), Counter(), Counter())
    for clip in found:
        values, n = clip.values[:, feature].astype(np.float64), len(clip.labels)
        for frame, label in enumerate(clip.labels):
            around = range(max(0, frame - 1), min(n, frame + 2))
            near = any(clip.labels[i] == phone for i in around)
            if label == phone and any(values[i] >= threshold for i in around):
                out.detected[clip.group, "found"] += 1
            if label is None or values[frame] <= 0:
                continue
            if values[frame] >= threshold:
                out.detected[clip.group, "detected"] += 1
                out.detected[clip.group, "hits"] += label == phone
                out.detected[clip.group, "near hits"] += near
            inside = [i for i in range(RANGES) if high * i / RANGES <= values[frame] < high * (i + 1) / RANGES]
            out.ranges[inside[0] if inside else RANGES - 1, label] += 1
            if values[frame] >= top_from / 5:
                out.strata[clip.group, "top" if values[frame] >= top_from else "lower", phone if near else label] += 1
        for start, _, label in clip.phones:
            if label != phone or not 0 <= start < 20 * n:
                continue
            after = [20 * i + 10 - start for i in range(n) if values[i] >= threshold and -100 <= 20 * i + 10 - start < 200]
            if after:
                out.latency[clip.group, after[0]] += 1
    return out

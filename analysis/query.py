"""Questions with quick answers, in both directions: when is a feature active, and which features are active at a time."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from analysis.features import Features
from analysis.scan_folder import KINDS, Scan
from cache.errors import HearsaeError
from cache.store import ActivationStore

EDGE = 1e-6
"""Of a frame: a time that rounding put this little before a frame's start belongs to the frame."""


def feature_moments(scan: Scan, feature: int, kind: str | None = None, store: ActivationStore | None = None) -> list[dict[str, Any]]:
    """A feature's examples, the top ones first: `kind, bin, rank, value, clip, source, frame, start_s, end_s, text, speaker`.

    kind: only top, range or quantile.
    store: the store that was scanned; default: where it was then. It knows sources and speakers.
    Raises HearsaeError for a feature or kind that does not exist.
    """
    if kind is not None and kind not in KINDS:
        raise HearsaeError(f"there are no examples of kind '{kind}': use one of {', '.join(reversed(KINDS))}")
    store = store or ActivationStore.open(scan.info["store"])
    rows = [row for row in scan.examples(feature).to_pylist() if kind in (None, row["kind"])]
    rows.sort(key=lambda row: -KINDS.index(row["kind"]))
    if any(not 0 <= row["clip"] < store.clips.num_rows for row in rows):
        raise HearsaeError(f"{store.path} is not the store of the scan {scan.path}: the scan names clips that it does not have")
    clips = store.clips.select(["source", "speaker"]).take(pa.array([row["clip"] for row in rows], pa.int64())).to_pylist()
    return [row | clip for row, clip in zip(rows, clips, strict=True)]


def top_features(
    store: ActivationStore,
    features: Features,
    clip: int | str,
    time_s: float | None = None,
    n: int = 10,
    scan: Scan | None = None,
    *,
    frame: int | None = None,
) -> list[dict[str, Any]]:
    """The `n` features with the largest positive values at a moment, strongest first: `feature, value, clip, source, frame, start_s, end_s`.

    clip: a clip's number, or the name of its source (whole, or its last part).
    time_s: time within the clip's source, as `start_s` of an example; or
    frame: frame within the clip; on the token axis, where there is no time, a token's index.
    scan: a scan of the same features; adds `z`, the value against all rows of the scan in standard deviations (None for a feature that
        never varies), and `density`.
    Raises HearsaeError for a clip that is unknown, ambiguous, skipped or not cached, and for a moment that is not in it.
    """
    if scan is not None:
        _refuse_other_features(scan, features, store)
    axis = store.sites[features.site]["axis"]
    if time_s is not None and axis == "token":
        raise HearsaeError(f"{features.site} has tokens, not times: give the token's index with --frame")
    number = _find_clip(store, clip, time_s)
    if time_s is not None and frame is None:
        frame = _frame_at(store, number, time_s)
    elif time_s is not None or frame is None:
        raise HearsaeError("give either a time or a frame")
    span = store.planned_span(axis, number)
    if not 0 <= frame < span.stop - span.start:
        raise HearsaeError(f"clip {number} has no {axis} {frame}: it has {span.stop - span.start}, counted from 0")
    values = features.dense(store.read_clip(features.site, number)[frame : frame + 1])[0]
    strongest = np.argsort(-values, kind="stable")[:n]
    clip_row = store.clips.select(["source", "start_s"]).slice(number, 1).to_pylist()[0]
    start_s = None if axis == "token" else clip_row["start_s"] + store.header.frame_seconds * frame
    end_s = None if start_s is None else start_s + store.header.frame_seconds
    where = {"clip": number, "source": clip_row["source"], "frame": frame, "start_s": start_s, "end_s": end_s}
    rows = [{"feature": int(i), "value": float(values[i])} | where for i in strongest if values[i] > 0]
    return rows if scan is None else [row | _against(scan, row["feature"], row["value"]) for row in rows]


def _against(scan: Scan, feature: int, value: float) -> dict[str, Any]:
    mean, std, density = (scan.features[name][feature].as_py() for name in ("mean", "std", "density"))
    return {"z": (value - mean) / std if std > 0 else None, "density": density}


def _refuse_other_features(scan: Scan, features: Features, store: ActivationStore) -> None:
    if scan.info["features"] != features.spec:
        raise HearsaeError(f"{scan.path} is a scan of {scan.info['features']}, not of {features.spec}")
    if scan.info["model"]["sha256"] != store.header.model["sha256"]:
        raise HearsaeError(f"{scan.path} is a scan of another model than that of {store.path}")


def _find_clip(store: ActivationStore, clip: int | str, time_s: float | None) -> int:
    """The clip of that number or source; of a source that was cut into several, the one that has the time."""
    sources = store.clips["source"].to_pylist()
    if isinstance(clip, int) or (clip.isdecimal() and clip not in sources):
        number = int(clip)
        if not 0 <= number < len(sources):
            raise HearsaeError(f"there is no clip {number} in {store.path}: it has clips 0 to {len(sources) - 1}")
        return number
    found = [i for i, source in enumerate(sources) if source == clip] or [i for i, source in enumerate(sources) if Path(source).name == clip]
    if not found:
        raise HearsaeError(f"{store.path} has no clip of a source '{clip}'; clips.parquet lists them")
    if len(found) > 1 and time_s is not None:
        within = [i for i in found if _covers(store, i, time_s)]
        if not within:
            end = max(_bounds(store, i)[1] for i in found)
            raise HearsaeError(f"'{clip}' has no clip at {time_s:g} s; its clips end at {end:g} s")
        found = within
    if len(found) > 1:
        raise HearsaeError(f"'{clip}' names several clips ({', '.join(map(str, found[:5]))}{', ...' if found[5:] else ''}): give a clip's number")
    return found[0]


def _bounds(store: ActivationStore, clip: int) -> tuple[float, float]:
    """Start and end of a clip within its source, in seconds."""
    start = store.clips["start_s"][clip].as_py()
    return start, start + store.clips["duration_s"][clip].as_py()


def _covers(store: ActivationStore, clip: int, time_s: float) -> bool:
    start, end = _bounds(store, clip)
    return start - EDGE * store.header.frame_seconds <= time_s < end - EDGE * store.header.frame_seconds


def _frame_at(store: ActivationStore, clip: int, time_s: float) -> int:
    start, end = _bounds(store, clip)
    if not _covers(store, clip, time_s):
        raise HearsaeError(f"{time_s:g} s is outside clip {clip}, which goes from {start:g} to {end:g} s of its source")
    return int(np.floor((time_s - start) / store.header.frame_seconds + EDGE))

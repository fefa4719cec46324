"""From how people name a moment to rows of a store: a clip by number or source, a time or a frame, a span of time."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cache.errors import HearsaeError
from cache.store import ActivationStore, Span

EDGE = 1e-6
"""Of a frame: a time that rounding put this little before a frame's start belongs to the frame."""
READ_ROWS = 32768
"""Rows of wanted clips that are read together: several chunks, few enough for a laptop's memory."""


class Stretch(NamedTuple):
    """Frames of one clip, one after the other, and when they are."""

    clip: int
    source: str
    first: int
    """Frame within the clip; on the token axis a token's index."""
    stop: int
    start_s: float | None
    """Of the first frame, within the clip's source; None on the token axis."""
    end_s: float | None


def stretch_at(store: ActivationStore, site: str, clip: int | str, time_s: float | None = None, frame: int | None = None) -> Stretch:
    """The one frame at a time of the clip's source, or the one of that number within the clip (on the token axis, the token).

    clip: a clip's number, or the name of its source (whole, or its last part).
    Raises HearsaeError for a site or clip that is unknown, for an ambiguous name, and for a moment that is not in the clip.
    """
    store.axis(site)
    axis = store.sites[site]["axis"]
    if time_s is not None and axis == "token":
        raise HearsaeError(f"{site} has tokens, not times: give the token's index with --frame")
    number = find_clip(store, clip, time_s)
    if time_s is not None and frame is None:
        frame = _frame_at(store, number, time_s)
    elif time_s is not None or frame is None:
        raise HearsaeError("give either a time or a frame")
    span = store.planned_span(axis, number)
    if not 0 <= frame < span.stop - span.start:
        raise HearsaeError(f"clip {number} has no {axis} {frame}: it has {span.stop - span.start}, counted from 0")
    return _stretch(store, site, number, frame, frame + 1)


def stretch_between(store: ActivationStore, site: str, clip: int | str, from_s: float, to_s: float) -> Stretch:
    """The frames that a span of time of the clip's source touches. Of a source in several clips, those of the clip that has `from_s`.

    Raises HearsaeError as `stretch_at` does, and for a span that ends before it starts or after the clip.
    """
    store.axis(site)
    if store.sites[site]["axis"] == "token":
        raise HearsaeError(f"{site} has tokens, not times: a span of time has no rows there")
    if not from_s < to_s:
        raise HearsaeError(f"a span from {from_s:g} to {to_s:g} s has no frames: it must end after it starts")
    number = find_clip(store, clip, from_s)
    first = _frame_at(store, number, from_s)
    start_s, end_s = bounds(store, number)
    span = store.planned_span("frame", number)
    stop = np.ceil((to_s - start_s) / store.header.frame_seconds - EDGE)
    if stop > span.stop - span.start:
        raise HearsaeError(f"{to_s:g} s is outside clip {number}, which goes from {start_s:g} to {end_s:g} s of its source")
    return _stretch(store, site, number, first, max(int(stop), first + 1))


def read_stretch(store: ActivationStore, site: str, stretch: Stretch) -> np.ndarray:
    """Its rows as stored, [frames, d]. Raises StoreError for a clip that was skipped or is not committed."""
    return store.read_clip(site, stretch.clip)[stretch.first : stretch.stop]


def read_clips(store: ActivationStore, site: str, clips: Iterable[int]) -> Iterator[tuple[list[Span], np.ndarray]]:
    """The rows of many clips, without those that were skipped or are not committed: neighbours together, so that chunks are read once.

    Yields the spans of some clips, ascending, and all rows [rows, d] from the first one's start to the last one's stop: a span's own rows
    are `rows[span.start - spans[0].start : span.stop - spans[0].start]`.
    """
    wanted = np.unique(np.fromiter(clips, np.int64))
    gap = store.axis(site).chunk_rows
    shard_of = store.clips["shard"].to_numpy()[wanted]
    for shard in np.unique(shard_of).tolist():
        if not store.is_committed(site, shard):
            continue
        mine = set(wanted[shard_of == shard].tolist())
        spans: list[Span] = []
        for span in (span for span in store.spans(shard, site) if span.clip in mine):
            if spans and (span.start - spans[-1].stop > gap or span.stop - spans[0].start > READ_ROWS):
                yield spans, store.read(site, spans[0].start, spans[-1].stop)
                spans = []
            spans.append(span)
        if spans:
            yield spans, store.read(site, spans[0].start, spans[-1].stop)


def find_clip(store: ActivationStore, clip: int | str, time_s: float | None = None) -> int:
    """The clip of that number or source; of a source that was cut into several, the one that has the time.

    Raises HearsaeError for one that is unknown or ambiguous.
    """
    sources = store.clips["source"]
    found = [] if isinstance(clip, int) else _where(pc.equal(sources, clip))
    if isinstance(clip, int) or (clip.isdecimal() and not found):
        number = int(clip)
        if not 0 <= number < len(sources):
            raise HearsaeError(f"there is no clip {number} in {store.path}: it has clips 0 to {len(sources) - 1}")
        return number
    found = found or _where(pc.ends_with(sources, f"/{clip}"))
    if not found:
        raise HearsaeError(f"{store.path} has no clip of a source '{clip}'; clips.parquet lists them")
    if len(found) > 1 and time_s is not None:
        within = [i for i in found if _covers(store, i, time_s)]
        if not within:
            end = max(bounds(store, i)[1] for i in found)
            raise HearsaeError(f"'{clip}' has no clip at {time_s:g} s; its clips end at {end:g} s")
        found = within
    if len(found) > 1:
        raise HearsaeError(f"'{clip}' names several clips ({', '.join(map(str, found[:5]))}{', ...' if found[5:] else ''}): give a clip's number")
    return found[0]


def _where(chosen: pa.ChunkedArray) -> list[int]:
    return pc.indices_nonzero(chosen).to_pylist()


def bounds(store: ActivationStore, clip: int) -> tuple[float, float]:
    """Start and end of a clip within its source, in seconds."""
    start = store.clips["start_s"][clip].as_py()
    return start, start + store.clips["duration_s"][clip].as_py()


def _covers(store: ActivationStore, clip: int, time_s: float) -> bool:
    start, end = bounds(store, clip)
    return start - EDGE * store.header.frame_seconds <= time_s < end - EDGE * store.header.frame_seconds


def _frame_at(store: ActivationStore, clip: int, time_s: float) -> int:
    start, end = bounds(store, clip)
    if not _covers(store, clip, time_s):
        raise HearsaeError(f"{time_s:g} s is outside clip {clip}, which goes from {start:g} to {end:g} s of its source")
    return int(np.floor((time_s - start) / store.header.frame_seconds + EDGE))


def _stretch(store: ActivationStore, site: str, clip: int, first: int, stop: int) -> Stretch:
    row = store.clips.select(["source", "start_s"]).slice(clip, 1).to_pylist()[0]
    if store.sites[site]["axis"] == "token":
        return Stretch(clip, row["source"], first, stop, None, None)
    frame_s = store.header.frame_seconds
    return Stretch(clip, row["source"], first, stop, row["start_s"] + frame_s * first, row["start_s"] + frame_s * stop)

"""What is said when: the words and phones of a store's timings at a moment, and the stretches in which a phone, a word or a text is said.

A regular expression is RE2's (github.com/google/re2/wiki/Syntax), in time linear in the text whatever the expression: it has no
back references and no look-around.
"""

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cache.errors import HearsaeError
from cache.store import ActivationStore
from cache.timings import Timings, has_timings, read_timings

MICROSECONDS = 1_000_000
PUNCTUATION = ".,;:!?\"'()[]{}…“”‘’«»-–— "
"""What a word may have around it that is not of the word."""
OPEN, CLOSE = "\x02", "\x03"
"""Put around what a regular expression finds: control characters, which no transcript has."""


class Said(NamedTuple):
    """Stretches of speech, by clip and start."""

    what: str
    """What was looked for, for messages: `phone M`, `word 'danger'`, ..."""
    clip: np.ndarray
    """int64 [n]"""
    start_s: np.ndarray
    """float64 [n], within the clip's source."""
    end_s: np.ndarray
    """float64 [n]"""
    label: list[str]
    """What is said there."""


def timings_of(store: ActivationStore) -> Timings | None:
    """The store's timings, where it has any."""
    return read_timings(store) if has_timings(store) else None


def labels_at(segments: pa.Table, clips: Sequence[int], times_s: Sequence[float | None]) -> list[str | None]:
    """The word or phone at each moment; None where there is none, or no time.

    segments: words or phones of the timings. times_s: within the clip's source; a segment holds its start and not its end.
    """
    clip, start, end = (segments[name].to_numpy() for name in ("clip", "start_s", "end_s"))
    found: list[int | None] = []
    for number, time_s in zip(clips, times_s, strict=True):
        first, stop = np.searchsorted(clip, [number, number + 1])
        at = None if time_s is None else first + int(np.searchsorted(_micro(start[first:stop]), _micro(time_s), side="right")) - 1
        found.append(at if at is not None and at >= first and _micro(time_s) < _micro(end[at]) else None)
    return segments["label"].take(pa.array(found, pa.int64())).to_pylist()


def said_between(segments: pa.Table, clip: int, start_s: float, end_s: float) -> list[str]:
    """The words or phones of a clip that a span of time touches, in order."""
    first, stop = np.searchsorted(segments["clip"].to_numpy(), [clip, clip + 1])
    mine = segments.slice(first, stop - first)
    touched = (mine["end_s"].to_numpy() > start_s) & (mine["start_s"].to_numpy() < end_s)
    return mine["label"].filter(pa.array(touched)).to_pylist()


def _micro(seconds: float | np.ndarray | None) -> np.ndarray:
    """Whole microseconds: a frame's middle often lies exactly on a boundary, and must fall on the same side whatever the rounding."""
    return np.round(np.asarray(seconds, np.float64) * MICROSECONDS).astype(np.int64)


# Looking for something that is said


def find_phone(timings: "Timings", phone: str) -> Said:
    """Every time that a phone is said. Raises HearsaeError, naming the phones that there are, where it never is."""
    labels = timings.phones["label"]
    chosen = pc.equal(labels, phone)
    if not pc.any(chosen).as_py():
        raise HearsaeError(f"nobody says the phone '{phone}': there are {', '.join(sorted(pc.unique(labels).to_pylist()))}")
    return _said(f"phone {phone}", timings.phones.filter(chosen))


def find_word(timings: "Timings", word: str) -> Said:
    """Every time that a word is said, whatever its case and the punctuation around it. Raises HearsaeError where it never is."""
    chosen = pc.equal(_bare(timings.words["label"]), _bare(pa.array([word]))[0])
    if not pc.any(chosen).as_py():
        raise HearsaeError(f"nobody says the word '{word}'; --text takes a regular expression over what is said")
    return _said(f"word '{word}'", timings.words.filter(chosen))


def find_text(timings: "Timings", pattern: str) -> Said:
    """Every time that a regular expression matches what is said: over all words of a clip in order, with one space between.

    A match is the time from the start of its first word to the end of its last; a word belongs to it with its first letter that does.
    Without regard to case, unless the expression has `(?-i)`. Raises HearsaeError where it is none of RE2's, or finds nothing.
    """
    words = timings.words
    clip, start, end = (words[name].to_numpy() for name in ("clip", "start_s", "end_s"))
    first_word = np.flatnonzero(np.diff(clip, prepend=-1))
    labels = pc.replace_substring_regex(words["label"].combine_chunks(), r"[\x00-\x1f]", " ")
    bounds = pa.array(np.append(first_word, len(clip)), pa.int32())
    said = pc.binary_join(pa.ListArray.from_arrays(bounds, labels), " ")
    try:
        marked = pc.replace_substring_regex(said, f"(?i){pattern}", rf"{OPEN}\0{CLOSE}")
    except pa.ArrowInvalid as error:
        reason = str(error).removeprefix("Invalid regular expression: ")
        raise HearsaeError(f"'{pattern}' is no regular expression that RE2 reads: {reason}") from None
    hits, text = [], []
    changed = pc.indices_nonzero(pc.not_equal(said, marked)).to_numpy()
    for first, stop, found in zip(first_word[changed], np.append(first_word, len(clip))[changed + 1], marked.take(changed).to_pylist(), strict=True):
        letters = np.cumsum([0, *(len(label) + 1 for label in labels[first:stop].to_pylist())]).tolist()
        for begin, after in _marked(found):
            hits.append((first + bisect_right(letters, begin) - 1, first + bisect_right(letters, after - 1) - 1))
            text.append(found.replace(OPEN, "").replace(CLOSE, "")[begin:after])
    if not hits:
        raise HearsaeError(f"'{pattern}' matches nothing that is said")
    from_word, to_word = np.array(hits).T
    return Said(f"text '{pattern}'", clip[from_word], start[from_word], end[to_word], text)


def _marked(text: str) -> list[tuple[int, int]]:
    """Where the marked parts begin and end in the text without marks, without the space around them; not those of nothing but space."""
    found, at = [], 0
    for i, part in enumerate(text.replace(CLOSE, OPEN).split(OPEN)):
        if i % 2 and part.strip():
            found.append((at + len(part) - len(part.lstrip()), at + len(part.rstrip())))
        at += len(part)
    return found


def _bare(labels: pa.Array) -> pa.Array:
    return pc.utf8_trim(pc.utf8_lower(labels), characters=PUNCTUATION)


def _said(what: str, segments: pa.Table) -> Said:
    clip, start_s, end_s = (segments[name].to_numpy() for name in ("clip", "start_s", "end_s"))
    return Said(what, clip, start_s, end_s, segments["label"].to_pylist())


def frames_of(said: Said, store: ActivationStore) -> tuple[np.ndarray, np.ndarray]:
    """First and last + 1 frame of each stretch within its clip, int64 [n] each: those whose middle it holds, which may be none."""
    frame = round(store.header.frame_seconds * MICROSECONDS)
    clips = pa.array(said.clip)
    clip_start = _micro(store.clips["start_s"].take(clips).to_numpy())
    n_frames = store.clips["n_frames"].take(clips).to_numpy()
    first, stop = (np.clip(-((clip_start + frame // 2 - _micro(time)) // frame), 0, n_frames) for time in (said.start_s, said.end_s))
    return first, np.maximum(first, stop)

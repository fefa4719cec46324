"""Forced alignment: when each word and phone of a clip's transcript is spoken."""

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from analysis.sphinx import UNPRUNED, Decoder, kept_decoder
from analysis.transcript import Word, words_of
from cache.audio import SAMPLE_RATE, Source, reopen_source
from cache.errors import SourceError
from cache.store import ActivationStore
from cache.timings import INTERVALS, SILENCE, UNALIGNED

HOP_S = 0.01
SHORTEST_PHONE_FRAMES = 3
"""A phone's model has three states of at least a frame each."""
LONGEST_ALIGNED_S = 120.0
"""Of one piece: the search's memory grows with audio times text."""
MOST_UNPRUNED = 6_000_000
"""Phones times frames that are searched with nothing given up on the way: memory grows with them, by some 100 bytes each."""
SUSPECT_SHORTEST = 0.4
"""A share of phones at the shortest length above which the text hardly is what was said."""
SUSPECT_PHONE_S = 1.0
"""A phone that lasts longer hardly is one."""

Interval = tuple[float, float, str]


class Unalignable(ValueError):
    """Why a clip has no times."""


class Alignment(NamedTuple):
    """Times within the audio, in seconds."""

    words: list[Interval]
    phones: list[Interval]
    guessed: list[str]
    """Words that the dictionary lacks."""
    retried: bool
    """Whether PocketSphinx's own beams lost the text."""

    @property
    def suspect(self) -> bool:
        """Whether text and audio hardly belong together."""
        lengths = np.array([end - start for start, end, label in self.phones if label != SILENCE])
        shortest = lengths < (SHORTEST_PHONE_FRAMES + 0.5) * HOP_S
        return bool(shortest.mean() > SUSPECT_SHORTEST or lengths.max() > SUSPECT_PHONE_S)


class Aligned(NamedTuple):
    """What came out of some shards."""

    words: list[tuple[int, float, float, str]]
    """Clip, start_s, end_s, label."""
    phones: list[tuple[int, float, float, str]]
    failures: list[tuple[int, str]]
    suspect: list[int]
    guessed: list[str]
    """Words that the dictionary lacks, once for each time they are said."""
    retried: list[int]

    @classmethod
    def nothing(cls) -> "Aligned":
        return cls([], [], [], [], [], [])

    def give(self, clip: int, start_s: float, end_s: float, words: list[Interval], phones: list[Interval]) -> None:
        """Adds what lies between two times to a clip, cut to them."""
        for into, intervals in ((self.words, words), (self.phones, phones)):
            cut = ((max(start_s, a), min(end_s, b), label) for a, b, label in intervals)
            into += [(clip, a, b, label) for a, b, label in cut if b > a]


def align_shard(store: ActivationStore, shard: int) -> Aligned:
    """Aligns the clips of the sources whose first clip is in a shard, so that pieces of one source are aligned together, whatever shards they are in.

    A clip that can't be aligned is among the failures, with its reason.
    """
    found = Aligned.nothing()
    clips = clips_of(store, shard)
    pieces: dict[tuple[str, int], Alignment | Unalignable] = {}
    try:
        source = reopen_source(store.header.dataset)
    except SourceError as error:
        return found._replace(failures=[(clip, str(error)) for clip in clips])
    for clip in clips:
        row = store.clips.slice(clip, 1).to_pylist()[0]
        start, end = row["start_s"], row["start_s"] + row["duration_s"]
        try:
            if row["text"]:
                origin, alignment = start, _align_span(source, row, start, end, row["text"])
            else:
                origin, alignment = _align_source(store, source, row, pieces)
        except Unalignable as error:
            found.failures.append((clip, str(error)))
            continue
        words, phones = ([(origin + a, origin + b, label) for a, b, label in intervals] for intervals in (alignment.words, alignment.phones))
        found.give(clip, start, end, words, phones)
        if alignment.suspect:
            found.suspect.append(clip)
        if alignment.retried:
            found.retried.append(clip)
        found.guessed.extend(alignment.guessed)
    return found


def merge(a: Aligned, b: Aligned) -> Aligned:
    """Both: associative, and commutative once sorted, as tables are."""
    return Aligned(
        a.words + b.words, a.phones + b.phones, a.failures + b.failures, a.suspect + b.suspect, a.guessed + b.guessed, a.retried + b.retried
    )


def tables(found: Aligned) -> tuple[pa.Table, pa.Table, pa.Table]:
    """Words, phones and unaligned, as `cache.timings.write_timings` takes them."""
    return _table(found.words, INTERVALS), _table(found.phones, INTERVALS), _table(found.failures, UNALIGNED)


def _table(rows: list[Any], schema: pa.Schema) -> pa.Table:
    return pa.table(list(zip(*rows, strict=True)), schema=schema) if rows else schema.empty_table()


def clips_of(store: ActivationStore, shard: int) -> list[int]:
    """Clips whose source's first clip is in the shard."""
    sources, rows = store.clips["source"].combine_chunks().dictionary_encode(), store.clips["source_row"].to_numpy()
    key = np.stack([sources.indices.to_numpy(), rows])
    _, first, which = np.unique(key, axis=1, return_index=True, return_inverse=True)
    shards = store.clips["shard"].to_numpy()
    return np.flatnonzero(shards[first][which.ravel()] == shard).tolist()


def _align_source(store: ActivationStore, source: Source, row: dict[str, Any], pieces: dict[Any, Any]) -> tuple[float, Alignment]:
    """Of a clip that is a piece of a longer source: the whole source's text on its whole audio, once."""
    if not row["source_text"]:
        raise Unalignable("it has no text")
    columns = store.clips.select(["source", "source_row", "start_s", "duration_s"])
    same = (columns["source"].to_numpy(zero_copy_only=False) == row["source"]) & (columns["source_row"].to_numpy() == row["source_row"])
    starts, lengths = columns["start_s"].to_numpy()[same], columns["duration_s"].to_numpy()[same]
    key = (row["source"], row["source_row"])
    if key not in pieces:
        try:
            pieces[key] = _align_span(source, row, float(starts.min()), float((starts + lengths).max()), row["source_text"])
        except Unalignable as error:
            pieces[key] = error
    if isinstance(pieces[key], Unalignable):
        raise pieces[key]
    return float(starts.min()), pieces[key]


def _align_span(source: Source, row: dict[str, Any], start_s: float, end_s: float, text: str) -> Alignment:
    if end_s - start_s > LONGEST_ALIGNED_S:
        raise Unalignable(f"{end_s - start_s:.0f} s are too long to be aligned at once (at most {LONGEST_ALIGNED_S:g})")
    try:
        audio = source.read(row["source"], row["source_row"], start_s, round((end_s - start_s) * SAMPLE_RATE))
    except SourceError as error:
        raise Unalignable(str(error)) from error
    return align(audio, text)


def align(audio: np.ndarray, text: str) -> Alignment:
    """Aligns a text to float32 audio [n_samples] at 16 kHz, 10 ms frames. Nothing of it depends on what was aligned before.

    Two passes: the words, with silence where it fits between them and the dictionary's best variant of each; then their phones.
    Raises Unalignable.
    """
    n_frames = int(len(audio) / SAMPLE_RATE / HOP_S)
    if len(text) > 100 + n_frames:
        raise Unalignable("its text is too long for its audio")
    try:
        words = words_of(text)
    except ValueError as error:
        raise Unalignable(str(error)) from error
    if not words:
        raise Unalignable("its text has no words")
    decoder, said = kept_decoder(), [part for word in words for part in word.spoken]
    try:
        entries, guessed = decoder.entries(said)
    except ValueError as error:
        raise Unalignable(str(error)) from error
    n_phones = sum(len((decoder.phones(entry) or "").split()) for entry in entries)
    if SHORTEST_PHONE_FRAMES * n_phones > n_frames:
        raise Unalignable("its text is too long for its audio")
    samples = np.round(np.clip(audio, -1, 1) * 32767).astype("<i2").tobytes()
    found = decoder.search(entries, samples)
    retried = found is None and n_phones * n_frames <= MOST_UNPRUNED
    if retried:
        unpruned = Decoder(**UNPRUNED)  # for this clip alone: its memory is not kept
        found = unpruned.search(unpruned.entries(said)[0], samples)
    if found is None:
        raise Unalignable("its text does not fit its audio")
    return _read(found, words)._replace(guessed=guessed, retried=retried)


def _read(found: Any, words: list[Word]) -> Alignment:
    owner = [number for number, word in enumerate(words) for _ in word.spoken]
    spans: dict[int, tuple[float, float]] = {}
    phones: list[Interval] = []
    said = 0
    for entry in found:
        filler = entry.name.startswith(("<", "[", "+"))  # silence; breath, cough and other noise, which we call silence too
        start, end = _seconds(entry)
        if not filler and said < len(owner):
            spans[owner[said]] = (spans.get(owner[said], (start, end))[0], end)
        said += not filler
        phones += [(*_seconds(phone), SILENCE if filler else phone.name) for phone in entry]
    if said != len(owner):
        raise Unalignable("its text does not fit its audio")
    return Alignment([(*spans[number], word.label) for number, word in enumerate(words)], phones, [], False)


def _seconds(entry: Any) -> tuple[float, float]:
    return round(entry.start * HOP_S, 2), round((entry.start + entry.duration) * HOP_S, 2)

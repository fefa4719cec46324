"""When each word of an experiment's clips is said: from files, from the dataset itself, or from a store that has been aligned."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa

from analysis.align import Aligned, Interval
from analysis.experiments.speech import Speech
from analysis.timing_files import import_times
from cache import micro
from cache.audio import Source, reopen_source
from cache.errors import HearsaeError
from cache.plan import SourceItem
from cache.store import ActivationStore
from cache.timings import has_timings, read_timings

WAYS = (
    "give --times FILES (.TextGrid, .ctm, .jsonl), --store STORE of a store that 'hearsae align' has been run on, or as --dataset a manifest of "
    "'hearsae transcribe', whose column 'words' has them"
)
"""How an experiment comes by the times of words."""
COLUMN = "words"
"""Of a dataset: [{"start_s": 0.1, "end_s": 0.4, "word": "hot"}, ...] or [[0.1, 0.4, "hot"], ...], seconds within the audio file."""


@dataclass(frozen=True)
class StoredSpeech(Speech):
    """The clips of a store, in its order and with its numbers. `dataset` is the path of the store; its audio is read from where it came from."""

    @cached_property
    def store(self) -> ActivationStore:
        return ActivationStore.open(self.dataset)

    @cached_property
    def source(self) -> Source:
        return reopen_source(self.store.header.dataset)

    @cached_property
    def table(self) -> pa.Table:
        return self.store.clips.slice(0, self.limit)


def word_times(speech: Speech, files: Sequence[str] = ()) -> list[list[Interval]]:
    """Of each clip, the words that are said in it: (start_s, end_s, label), seconds within its source, sorted.

    From `files` (as `hearsae align --import` takes them) if there are any; else from the store, if it was aligned; else from the dataset's column
    `words`; else, for the speech of micro, from the times that come with it. A clip without times has no words.
    Raises HearsaeError where there are no times at all, or for what is malformed.
    """
    if files:
        found = import_times(speech.table, list(files)).aligned.words
        if not found:
            raise HearsaeError(f"the times in {' '.join(files)} are of no clip of {speech.dataset}: name the sources as the dataset does")
    elif isinstance(speech, StoredSpeech) and (has_timings(speech.store) or COLUMN not in speech.table.column_names):
        rows = read_timings(speech.store).words.to_pylist()
        found = [(row["clip"], row["start_s"], row["end_s"], row["label"]) for row in rows if row["clip"] < speech.table.num_rows]
    elif COLUMN in speech.table.column_names:
        found = _of_column(speech)
    elif speech.dataset == micro.NAME:
        found = import_times(speech.table, [str(micro.SPEECH / "alignments.jsonl")]).aligned.words
    else:
        found = []
    if not found:
        raise HearsaeError(f"when the words of {speech.dataset} are said is not known: {WAYS}")
    words: list[list[Interval]] = [[] for _ in range(speech.table.num_rows)]
    for clip, start_s, end_s, label in sorted(found):
        words[clip].append((start_s, end_s, label))
    return words


def _of_column(speech: Speech) -> list[tuple[int, float, float, str]]:
    """From the items themselves: a table can't hold numbers and words in one list."""
    wanted = {(clip.source, clip.source_row) for clip in speech.clips}
    words: dict[tuple[str, int], list[Interval]] = {}
    for item in speech.source.items():
        if isinstance(item, SourceItem) and (item.source, item.source_row) in wanted:
            words[item.source, item.source_row] = _intervals(item.extra.get(COLUMN) or (), item.source)
            if len(words) == len(wanted):
                break
    found = Aligned.nothing()
    for number, clip in enumerate(speech.clips):
        found.give(number, clip.start_s, clip.start_s + clip.duration_s, words[clip.source, clip.source_row], [])
    return found.words


def _intervals(rows: Any, source: str) -> list[Interval]:
    try:
        fields = ((row["start_s"], row["end_s"], row["word"]) if isinstance(row, dict) else row for row in rows)
        intervals = [(float(start), float(end), str(label)) for start, end, label in fields]
        if not all(math.isfinite(start) and math.isfinite(end) and 0 <= start <= end for start, end, _ in intervals):
            raise ValueError("a time that is not finite, below 0, or runs backwards")
    except (TypeError, ValueError, KeyError) as error:
        form = '[{"start_s": ..., "end_s": ..., "word": ...}, ...] or [[start_s, end_s, word], ...]'
        raise HearsaeError(f"{source}: its column '{COLUMN}' has no times of words ({form}): {error}") from None
    return intervals

"""The clips that a page's examples refer to: their table and their audio, each clip once."""

import base64
import io
from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import soundfile

from analysis.explorer.datafiles import write_data
from cache.audio import Source, load_clip, reopen_source
from cache.errors import SourceError
from cache.header import SAMPLE_RATE
from cache.store import ActivationStore

AUDIO = {"vorbis": ("OGG", "VORBIS"), "flac": ("FLAC", "PCM_16")}
"""Browsers decode both with every sample in its place. FLAC is exact and three times as large."""


class Use(NamedTuple):
    """Clips of a store that one scan's examples lie in."""

    store: ActivationStore
    clips: np.ndarray
    """int64, in any order."""
    is_heard: bool
    """False where nothing is played: of tokens whose time is not known."""


class Clips:
    """The clips of all uses, numbered through over all stores."""

    def __init__(self, uses: Sequence[Use]) -> None:
        self.uses = uses
        self.stores = list({id(use.store): use.store for use in uses}.values())
        self.of_store = [_distinct(use.clips for use in uses if use.store is store) for store in self.stores]
        """int64, ascending."""
        self.first = np.cumsum([0, *map(len, self.of_store)])
        """The page's number of each store's first clip."""

    def __len__(self) -> int:
        return int(self.first[-1])

    def numbers(self, store: ActivationStore, clips: np.ndarray) -> np.ndarray:
        """The page's numbers of a store's clips."""
        which = next(i for i, one in enumerate(self.stores) if one is store)
        return self.first[which] + np.searchsorted(self.of_store[which], clips)

    def heard(self) -> list[tuple[int, ActivationStore, int, Source | None]]:
        """Number, store, clip and source of the clips that are played."""
        found: list[tuple[int, ActivationStore, int, Source | None]] = []
        for store in self.stores:
            clips = _distinct(use.clips for use in self.uses if use.store is store and use.is_heard)
            try:
                source = reopen_source(store.header.dataset)
            except SourceError:
                source = None  # `load_clip` says why, clip by clip
            found += zip(self.numbers(store, clips).tolist(), repeat(store), clips.tolist(), repeat(source))
        return found


def _distinct(parts: Iterable[np.ndarray]) -> np.ndarray:
    return np.unique(np.concatenate([np.zeros(0, np.int64), *parts]))


def clip_texts(store: ActivationStore) -> pa.ChunkedArray:
    """The text of every clip, else that of its source; as the scan's examples have it."""
    return pc.coalesce(store.clips["text"], store.clips["source_text"])


def write_clips(data: Path, clips: Clips, said: dict[str, Any] | None, audio: str, progress: Callable[[int, int], None]) -> int:
    """Writes the clips' audio and their table. Returns how many clips that should be heard can't be.

    said: their words and phones, of `clip_pages.pack_said`.
    audio: one of `AUDIO`, or `none`.
    """
    columns: dict[str, list[Any]] = {name: [] for name in ("source", "speaker", "start_s", "text", "silent")}
    for store, numbers in zip(clips.stores, clips.of_store, strict=True):
        table = store.clips.take(numbers)
        for name in ("source", "speaker", "start_s"):
            columns[name] += table[name].to_pylist()
        columns["text"] += clip_texts(store).take(numbers).to_pylist()
    columns["silent"] = ["this page was made without audio"] * len(clips)
    heard = clips.heard() if audio != "none" else []
    for done, (number, store, clip, source) in enumerate(heard):
        columns["silent"][number] = _write_audio(data, number, store, clip, source, audio)
        progress(done + 1, len(heard))
    write_data(data, "clips", columns | {"said": said})
    return sum(columns["silent"][number] is not None for number, *_ in heard)


def _write_audio(data: Path, number: int, store: ActivationStore, clip: int, source: Source | None, audio: str) -> str | None:
    """Writes one clip's audio. Returns why that was not possible, if so."""
    try:
        write_data(data, f"audio/{number}", _encode(load_clip(store, clip, source), audio))
    except SourceError as error:
        return str(error)
    return None


def _encode(samples: np.ndarray, audio: str) -> str:
    file = io.BytesIO()
    container, codec = AUDIO[audio]
    soundfile.write(file, np.clip(samples, -1, 1), SAMPLE_RATE, format=container, subtype=codec)
    return base64.b64encode(file.getvalue()).decode("ascii")

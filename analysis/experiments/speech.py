"""What an experiment runs on: the clips of a dataset, or of one file, and how work on them is shared out."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import islice
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from cache.audio import Source, open_source
from cache.errors import HearsaeError, ModelError, SourceError
from cache.header import FRAME_SECONDS, SAMPLE_RATE
from cache.model import LoadedModel, fast_matmul, load_model, log_mel
from cache.plan import Plan, make_plan

Result = TypeVar("Result")

PIECE_CLIPS = 16
"""Clips that a worker is given at once: enough for decoding to gain by batching, few enough to share out. Results do not depend on the workers."""


class Clip(NamedTuple):
    """One clip of the speech."""

    clip: int
    source: str
    source_row: int
    start_s: float
    """Within its source."""
    duration_s: float
    n_frames: int
    """That the clip itself takes of Whisper's window; what follows is padding."""
    text: str | None
    """Its transcript, where the dataset has one."""
    speaker: str | None
    language: str | None


@dataclass(frozen=True)
class Speech:
    """The clips of a dataset, in its order. Opens nothing until asked, so that workers get it as it is."""

    dataset: str
    split: str | None = None
    limit: int | None = None
    """Files or rows to take, from the first."""
    subset: str | None = None
    """Configuration of a hub dataset."""
    clip_seconds: float = 30.0
    """Longer audio is cut into clips of this length; at most the model's window."""
    decode_first: bool = False
    """Decode every clip beforehand, and leave out those that can't be: little beside what is done with them, and nothing stops in the middle."""

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise HearsaeError(f"--limit {self.limit} must be at least 1")

    @cached_property
    def source(self) -> Source:
        return open_source(self.dataset, self.split, self.subset)

    @cached_property
    def plan(self) -> Plan:
        """Raises HearsaeError where there is no readable audio."""
        return make_plan(islice(self.source.items(), self.limit), clip_seconds=self.clip_seconds, shuffle=False)

    @property
    def table(self) -> pa.Table:
        """As clips.parquet of a store (docs/store.md), with every column that the dataset has. Raises HearsaeError as `plan` does."""
        return self._readable[0]

    @property
    def skipped(self) -> list[str]:
        """What was left out, each with its reason; nothing as long as nobody asked for clips."""
        return vars(self)["_readable"][1] if "_readable" in vars(self) else []

    @cached_property
    def _readable(self) -> tuple[pa.Table, list[str]]:
        planned = self.plan.clips
        skipped = [f"{row['source']} (row {row['source_row']}): {row['reason']}" for row in self.plan.skipped.to_pylist()]
        if not self.decode_first:
            return planned, skipped
        kept = []
        for clip in _clips_of(planned):
            try:
                self.read(clip)
                kept.append(clip.clip)
            except SourceError as error:
                skipped.append(f"{clip.source} (row {clip.source_row}): {error}")
        if not kept:
            raise HearsaeError(f"none of the audio in {self.dataset} can be decoded ({skipped[0]})")
        return planned.take(kept).set_column(0, "clip", pa.array(range(len(kept)), pa.int64())), skipped

    @cached_property
    def clips(self) -> list[Clip]:
        return _clips_of(self.table)

    def pieces(self, size: int = PIECE_CLIPS) -> list[list[Clip]]:
        """All clips, in order, `size` at a time."""
        return [self.clips[first : first + size] for first in range(0, len(self.clips), size)]

    def read(self, clip: Clip) -> np.ndarray:
        """float32 [n_samples], mono, 16 kHz. Raises SourceError saying what is wrong with the audio."""
        return self.source.read(clip.source, clip.source_row, clip.start_s, round(clip.duration_s * SAMPLE_RATE))

    def texts(self) -> list[str]:
        """The transcript of every clip. Raises HearsaeError where one has none."""
        without = [clip for clip in self.clips if not clip.text]
        if without:
            raise HearsaeError(f"{without[0].source} has no transcript ({len(without)} of {len(self.clips)} clips): give the dataset a column 'text'")
        return [clip.text or "" for clip in self.clips]


def _clips_of(table: pa.Table) -> list[Clip]:
    return [Clip(**row) for row in table.select(list(Clip._fields)).to_pylist()]


class Mapper(Protocol):
    """Applies a function to every piece of work and gives the results in the order of the pieces: in this process, or on workers."""

    def __call__(self, function: Callable[[Any], Result], pieces: Sequence[Any]) -> list[Result]: ...


def in_this_process(function: Callable[[Any], Result], pieces: Iterable[Any]) -> list[Result]:
    """One piece after the other."""
    return [function(piece) for piece in pieces]


@lru_cache(maxsize=2)
def worker_model(name: str, device: str = "auto") -> LoadedModel:
    """The model, loaded once in each process. Nobody may leave it changed."""
    return load_model(name, device)


def whole_model(name: str, device: str = "auto", what: str = "this experiment") -> LoadedModel:
    """`worker_model` of a checkpoint that has a decoder. Raises ModelError for one that has none."""
    model = worker_model(name, device)
    if not model.has_decoder:
        raise ModelError(f"{name} is an encoder without a decoder, and {what} needs a whole Whisper: give another --model")
    return model


def clip_mel(model: LoadedModel, speech: Speech, clip: Clip) -> Tensor:
    """The log-mel of one clip, padded to the whole window: fp32 [n_mels, 2 * n_audio_ctx].

    Raises HearsaeError for a clip that is longer than the model's window, and SourceError for one that can't be read.
    """
    window_s = model.dims.n_audio_ctx * FRAME_SECONDS
    if clip.duration_s > window_s:
        raise HearsaeError(f"{clip.source} has a clip of {clip.duration_s:.1f} s, and {model.name} hears {window_s:.0f} s at once")
    return log_mel(speech.read(clip), model)


@torch.no_grad()
def encode(model: LoadedModel, speech: Speech, clips: Sequence[Clip]) -> Tensor:
    """The encoder's output for each clip, padded to the whole window: fp32 [clips, n_audio_ctx, d]. Raises what `clip_mel` does."""
    encoder = model.module.get_submodule("encoder")
    with fast_matmul():
        return torch.stack([encoder(clip_mel(model, speech, clip)[None])[0] for clip in clips])

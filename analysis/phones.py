"""Features and phones: which phone every stored frame lies in, and how well each feature tells each phone from all others.

The measure is the area under the ROC curve over frames: the chance that a frame of the phone has a higher value than a frame of any other
phone, ties counting half. 1 is a perfect detector, 0.5 says nothing, 0 is a perfect detector of everything else.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from analysis.features import Features
from analysis.phone_labels import UNLABELLED, frame_track, microseconds
from cache.errors import SourceError, StoreError
from cache.store import ActivationStore, Span

BUFFER_BYTES = 512 << 20
"""Of dense feature values in memory. Features that don't fit with all their rows are done in several passes."""
BLOCK_ROWS = 8192
"""Rows read at once: whole chunks, few enough for a laptop's memory."""


class Segment(NamedTuple):
    """A word or a phone and when it is said, in seconds from the start of its audio file."""

    start_s: float
    end_s: float
    label: str


class Alignment(NamedTuple):
    """Who says what when in one audio file."""

    words: list[Segment]
    phones: list[Segment]
    """ARPAbet, without overlaps."""


class FrameLabels(NamedTuple):
    """The phone of every stored frame of a site, in the order of the rows' addresses."""

    phones: tuple[str, ...]
    """Sorted."""
    label: np.ndarray
    """int16 [rows]: index into `phones`, or UNLABELLED."""


class PhoneTable(NamedTuple):
    """How well every feature tells every phone."""

    phones: tuple[str, ...]
    frames: np.ndarray
    """int64 [phones]"""
    auc: np.ndarray
    """float64 [features, phones]; NaN for a phone that no frame has, or all."""


class BestPhone(NamedTuple):
    """The phone that each feature tells best."""

    phone: np.ndarray
    """int64 [features]: index into the phones of the table."""
    auc: np.ndarray
    """float64 [features]"""


# Labels


def read_alignments(path: Path) -> dict[str, Alignment]:
    """The lines of an `alignments.jsonl` by their `file_name`, which is a path relative to the dataset's root, as a store's `source` is.

    Raises SourceError for a file that is not there or not of this form.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} can't be read: {getattr(error, 'strerror', None) or error}") from error
    alignments = {}
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            words, phones = ([Segment(float(start), float(end), str(label)) for start, end, label in row[kind]] for kind in ("words", "phones"))
            alignments[str(row["file_name"])] = Alignment(words, phones)
        except (ValueError, TypeError, KeyError) as error:
            raise SourceError(f'{path}, line {number} is no alignment (file_name, words and phones as [start, end, "label"]): {error}') from error
    return alignments


def frame_phones(phones: Sequence[Segment], n_frames: int, start_s: float, index: Mapping[str, int]) -> np.ndarray:
    """The label of each frame of a clip, int16 [n_frames]. A frame belongs to the phone that holds its middle.

    Frame f is the time from start_s + 0.02 f to start_s + 0.02 (f + 1); a phone holds its start and not its end. UNLABELLED where no phone is.
    """
    times_us = microseconds(np.array([phone[:2] for phone in phones], np.float64).reshape(-1, 2)) - microseconds(np.array(start_s))
    return frame_track(times_us[:, 0], times_us[:, 1], np.array([index[phone.label] for phone in phones], np.int16), n_frames)


def label_frames(store: ActivationStore, site: str, alignments: Mapping[str, Alignment]) -> FrameLabels:
    """The phones of all stored frames of a site. Frames of clips without an alignment, and outside all phones, are UNLABELLED.

    Raises StoreError for a site on the token axis, and where no clip of the store has an alignment.
    """
    store.axis(site)
    if store.sites[site]["axis"] != "frame":
        raise StoreError(f"{site} has tokens, not frames: phones can be compared with encoder sites only")
    sources, starts = store.clips["source"].to_pylist(), store.clips["start_s"].to_pylist()
    phones = sorted({segment.label for source in set(sources) & alignments.keys() for segment in alignments[source].phones})
    if not phones:
        raise StoreError(f"no clip of {store.path} has an alignment: their file names differ, for example {sources[0]}")
    index = {phone: i for i, phone in enumerate(phones)}
    silent = Alignment([], [])
    labels = [
        frame_phones(alignments.get(sources[span.clip], silent).phones, span.stop - span.start, starts[span.clip], index)
        for shard in store.committed(site)
        for span in store.spans(shard, site)
    ]
    return FrameLabels(tuple(phones), np.concatenate(labels))


# Features against labels


def phone_auc(store: ActivationStore, features: Features, labels: FrameLabels, buffer_bytes: int = BUFFER_BYTES) -> PhoneTable:
    """The AUC of every feature for every phone, over all labelled frames; exact, ties averaged.

    labels: of `label_frames` for the features' site. buffer_bytes: of dense values. Sparse features are held as nonzero values alone, in one
    pass.
    """
    used = labels.label != UNLABELLED
    label = labels.label[used].astype(np.int64)
    frames = np.bincount(label, minlength=len(labels.phones))
    columns = (
        _sparse_columns if features.sparse(np.zeros((0, store.sites[features.site]["width"]), store.header.dtype)) is not None else _dense_columns
    )
    rank_sums = np.stack([_rank_sums(values, label[row], frames) for row, values in columns(store, features, used, buffer_bytes)])
    with np.errstate(invalid="ignore", divide="ignore"):
        auc = (rank_sums - frames * (frames + 1) / 2) / (frames * (len(label) - frames))  # Mann-Whitney's U over the number of pairs
    return PhoneTable(labels.phones, frames, auc)


def best_phone(table: PhoneTable, without: Iterable[str] = (), least_frames: int = 1, either_sign: bool = False) -> BestPhone:
    """The phone with the highest AUC, for every feature.

    without: phones not to consider. least_frames: so many frames a phone must have; on few, a high AUC comes by chance.
    either_sign: let low values tell a phone as well as high ones, for features whose sign is arbitrary.
    Raises StoreError where no phone is left.
    """
    considered = (table.frames >= least_frames) & ~np.isin(table.phones, list(without)) & ~np.isnan(table.auc).any(axis=0)
    if not considered.any():
        raise StoreError(f"no phone has {least_frames} frames or more")
    auc = np.maximum(table.auc, 1 - table.auc) if either_sign else table.auc
    auc = np.where(considered, auc, -np.inf)
    phone = auc.argmax(axis=1)
    return BestPhone(phone, auc[np.arange(len(auc)), phone])


def _dense_columns(store: ActivationStore, features: Features, used: np.ndarray, buffer_bytes: int) -> Iterator[tuple[slice, np.ndarray]]:
    """(all rows, their values) of one feature after another."""
    rows = int(used.sum())
    block = max(1, buffer_bytes // (4 * max(rows, 1)))
    for first in range(0, features.count, block):
        values = np.empty((min(block, features.count - first), rows), np.float32)
        filled = 0
        for part in _used_rows(store, features, used):
            values[:, filled : filled + len(part)] = features.dense(part)[:, first : first + block].T
            filled += len(part)
        for column in values:
            yield slice(None), column


def _sparse_columns(store: ActivationStore, features: Features, used: np.ndarray, buffer_bytes: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(rows where it is not zero, values there) of one feature after another."""
    row, latent, value, filled = [], [], [], 0
    for part in _used_rows(store, features, used):
        codes = features.sparse(part)
        assert codes is not None
        row.append(codes.row + filled)
        latent.append(codes.latent)
        value.append(codes.value)
        filled += len(part)
    by_latent = np.argsort(np.concatenate(latent), kind="stable")
    bounds = np.cumsum(np.bincount(np.concatenate(latent), minlength=features.count))[:-1]
    yield from zip(np.split(np.concatenate(row)[by_latent], bounds), np.split(np.concatenate(value)[by_latent], bounds), strict=True)


def _used_rows(store: ActivationStore, features: Features, used: np.ndarray) -> Iterator[np.ndarray]:
    """The labelled rows, some thousand at a time."""
    first = 0
    for shard in store.committed(features.site):
        for spans in _blocks(store.spans(shard, features.site)):
            start, stop = spans[0].start, spans[-1].stop
            keep = np.zeros(stop - start, bool)  # skipped clips may lie between
            for span in spans:
                n = span.stop - span.start
                keep[span.start - start : span.stop - start] = used[first : first + n]
                first += n
            if keep.any():
                yield store.read(features.site, start, stop)[keep]


def _blocks(spans: list[Span]) -> Iterator[list[Span]]:
    """Clips in address order, in groups of BLOCK_ROWS rows or a little more."""
    block: list[Span] = []
    for span in spans:
        block.append(span)
        if span.stop - block[0].start >= BLOCK_ROWS:
            yield block
            block = []
    if block:
        yield block


def _rank_sums(values: np.ndarray, label: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """The sum of the ranks of every phone's frames, float64 [phones]; ranks from 1, tied values share their mean rank.

    values, label: of the frames that are given. frames: [phones], of all frames; the value of those that are not given is zero.
    """
    order = np.argsort(values)
    ascending = values[order]
    first = np.flatnonzero(np.r_[True, ascending[1:] != ascending[:-1]]) if len(values) else np.zeros(0, np.int64)
    tied = np.diff(np.r_[first, len(values)])
    implicit = frames - np.bincount(label, minlength=len(frames))
    zeros, below = implicit.sum(), np.searchsorted(ascending, 0)
    # Implicit zeros rank between the negative and the positive values. Values given as zero would tie with them, and are never given then.
    rank = np.repeat(first + (tied + 1) / 2, tied) + np.where(ascending > 0, zeros, 0)
    return np.bincount(label[order], rank, minlength=len(frames)) + implicit * (below + (zeros + 1) / 2)

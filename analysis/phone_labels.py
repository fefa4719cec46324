"""Which phone every frame of a block lies in, the same under shuffled labels, and which jackknife group its clip is in.

**Shuffled labels**, the control: the label track of each clip is rotated by a seeded hash of the clip. Every phone keeps its frames, its
neighbours and how long it lasts; only what the activations were doing at that moment is lost. Rotations of less than half a second,
either way, are avoided where the clip is long enough, because neighbouring frames are alike.

**Groups**: a speaker's clips stay together, so that an interval says how far a figure would move with other speakers. Clips whose speaker
is not known are units of their own. Units are dealt out to the groups in the order of a hash.
"""

import hashlib
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from analysis.arpabet import plain
from analysis.blocks import Block
from analysis.grid import frame_hash
from cache.errors import HearsaeError
from cache.header import FRAME_SECONDS

UNLABELLED = -1
GROUPS = 20
"""Of a jackknife: enough for an interval that is itself stable to a sixth, few enough to count by."""
LEAST_SHIFT = 25
"""Frames, half a second: beyond most words."""
_MICROSECONDS = 1_000_000
FRAME_US = round(FRAME_SECONDS * _MICROSECONDS)
"""Times are whole microseconds: a frame's middle often lies exactly on a phone's boundary, and must fall on the same side everywhere."""


class BlockLabels(NamedTuple):
    """What is said in the rows of one block."""

    label: np.ndarray
    """int16 [rows]: index into the phones, or UNLABELLED."""
    shuffled: np.ndarray
    """int16 [rows]: the same, the track of every clip rotated."""
    group: np.ndarray
    """int16 [clips of the block]"""
    occurrence: np.ndarray
    """int64 [phones + 1]: where the occurrences of each phone begin in the two arrays below."""
    occurrence_clip: np.ndarray
    """int32: which clip of the block, counted from 0."""
    occurrence_us: np.ndarray
    """int64: when it starts, in microseconds from the start of the clip."""


class PhoneLabels(NamedTuple):
    """The phones of a store's clips. `labels_of` makes it; it can be pickled."""

    phones: tuple[str, ...]
    """Sorted."""
    first: np.ndarray
    """int64 [clips + 1]: clip c has the segments `first[c]:first[c + 1]`."""
    start_us: np.ndarray
    """int64 [segments], from the start of the clip; negative for a phone that begins before it."""
    end_us: np.ndarray
    """int64 [segments]"""
    phone: np.ndarray
    """int16 [segments]"""
    group: np.ndarray
    """int16 [clips]"""
    seed: int
    """Of the shuffle."""

    def of(self, block: Block) -> BlockLabels:
        """The labels of a block's rows. A frame belongs to the phone that holds its middle; a phone holds its start and not its end."""
        label = np.full(len(block.clip_of_row), UNLABELLED, np.int16)
        shuffled = label.copy()
        clips, starts, phones = [], [], []
        for i, clip in enumerate(block.clips.tolist()):
            rows = slice(block.first_row[i], block.first_row[i + 1])
            own = slice(self.first[clip], self.first[clip + 1])
            n = int(rows.stop - rows.start)
            label[rows] = frame_track(self.start_us[own], self.end_us[own], self.phone[own], n)
            shuffled[rows] = np.roll(label[rows], rotation(self.seed, clip, n))
            begins = (self.start_us[own] >= 0) & (self.start_us[own] < n * FRAME_US)
            starts.append(self.start_us[own][begins])
            phones.append(self.phone[own][begins])
            clips.append(np.full(begins.sum(), i, np.int32))
        phone = np.concatenate(phones)
        order = np.argsort(phone, kind="stable")
        return BlockLabels(
            label=label,
            shuffled=shuffled,
            group=self.group[block.clips],
            occurrence=np.searchsorted(phone[order], np.arange(len(self.phones) + 1)),
            occurrence_clip=np.concatenate(clips)[order],
            occurrence_us=np.concatenate(starts)[order],
        )


def labels_of(phones: pa.Table, clips: pa.Table, seed: int = 0) -> PhoneLabels:
    """The labels of a store.

    phones: `clip`, `start_s`, `end_s` within the clip's source, `label`; sorted by clip and time, without overlaps. clips: the store's.
    ARPAbet's stress digits are taken off. seed: of the shuffle. Raises HearsaeError where there are no phones.
    """
    if not phones.num_rows:
        raise HearsaeError("the store's timings hold no phones: run 'hearsae align' on it again")
    encoded = pc.dictionary_encode(phones["label"]).combine_chunks()
    spelled = [plain(label) for label in encoded.dictionary.to_pylist()]
    names = tuple(sorted(set(spelled)))
    index = np.array([names.index(name) for name in spelled], np.int16)
    clip = phones["clip"].to_numpy()
    clip_start_us = microseconds(clips["start_s"].to_numpy())[clip]
    return PhoneLabels(
        phones=names,
        first=np.searchsorted(clip, np.arange(clips.num_rows + 1)),
        start_us=microseconds(phones["start_s"].to_numpy()) - clip_start_us,
        end_us=microseconds(phones["end_s"].to_numpy()) - clip_start_us,
        phone=index[encoded.indices.to_numpy()],
        group=groups_of(clips),
        seed=seed,
    )


def microseconds(seconds: np.ndarray) -> np.ndarray:
    """Seconds, to the nearest whole microsecond, int64."""
    return np.round(seconds * _MICROSECONDS).astype(np.int64)


def frame_track(start_us: np.ndarray, end_us: np.ndarray, phone: np.ndarray, n_frames: int) -> np.ndarray:
    """The label of each frame of a clip, int16 [n_frames]; times from the start of the clip."""
    track = np.full(n_frames, UNLABELLED, np.int16)
    middle = FRAME_US // 2 + FRAME_US * np.arange(n_frames)
    first, stop = np.searchsorted(middle, start_us), np.searchsorted(middle, end_us)
    for i in range(len(phone)):
        track[first[i] : stop[i]] = phone[i]
    return track


def rotation(seed: int, clip: int, n_frames: int) -> int:
    """By how many frames the label track of a clip of so many frames is rotated, for the shuffle."""
    least = min(LEAST_SHIFT, n_frames // 3)
    drawn = int(frame_hash(seed, np.array([clip]), np.array([0]))[0])
    return least + drawn % (n_frames - 2 * least + 1)


def groups_of(clips: pa.Table) -> np.ndarray:
    """The jackknife group of every clip, int16 [clips], by speaker; see the module. Depends on the names of the units alone."""
    speakers = clips["speaker"].to_pylist() if "speaker" in clips.column_names else [None] * clips.num_rows
    units = [f"speaker {speaker}" if speaker else f"clip {clip}" for clip, speaker in enumerate(speakers)]
    ordered = sorted(set(units), key=lambda unit: hashlib.sha256(unit.encode()).digest())
    place = {unit: i % GROUPS for i, unit in enumerate(ordered)}
    return np.array([place[unit] for unit in units], np.int16)

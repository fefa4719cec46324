"""Concepts that a store's clips come with, as labelled samples for probes: phones and classes of phones in frames, columns of clips.parquet.

A concept is named `phone:AA`, `phones` (each of the frequent ones), `class:vowel` (`analysis.arpabet`), or by a column of clips.parquet: `accent`
(each of its frequent values against the rest) or `accent=Scottish`.

A sample is one frame, or one whole clip whose frames' values are pooled. Of more than are wanted those with the lowest seeded hash are taken: the
same ones wherever it is computed, and no more of them in memory than are wanted.

Samples are tested on speakers that no probe was trained on: speakers are dealt out to PARTS groups, and a group is held out. Where the concept
is the speaker that can't be, and clips are dealt out.
"""

import hashlib
from collections import Counter, defaultdict
from typing import Literal, NamedTuple

import numpy as np

from analysis.arpabet import CLASSES
from analysis.blocks import blocks
from analysis.features import Features, Neurons
from analysis.grid import frame_hash
from analysis.phone_labels import UNLABELLED, PhoneLabels, frame_track, labels_of, rotation
from cache.errors import HearsaeError
from cache.store import ActivationStore
from cache.timings import read_timings

Pool = Literal["none", "mean", "max"]
PARTS = 4
"""Groups of speakers; one is held out. With fewer speakers than this no share of them is left to speak for others."""
SHUFFLES = 16
"""Shuffled tracks of labels that every sample comes with."""
OF_PHONES = "phones, phone:AA, class:vowel, or a column of the clips (COLUMN or COLUMN=VALUE)"


class Track(NamedTuple):
    """What is to be told apart, in every frame of every clip."""

    names: tuple[str, ...]
    """The labels: phones, or values of a column."""
    concepts: dict[str, np.ndarray]
    """Concept -> bool [names]: which labels have it."""
    column: str | None
    """The column whose values the labels are; None for phones."""
    of_clip: np.ndarray | None
    """int32 [clips]: where the labels are values of a column, that of each clip or UNLABELLED."""
    phones: PhoneLabels | None

    def frames(self, clip: int, n_frames: int) -> np.ndarray:
        """The labels of a clip's frames, int [n_frames]."""
        if self.of_clip is not None:
            return np.full(n_frames, self.of_clip[clip])
        assert self.phones is not None
        own = slice(self.phones.first[clip], self.phones.first[clip + 1])
        return frame_track(self.phones.start_us[own], self.phones.end_us[own], self.phones.phone[own], n_frames)


class Samples(NamedTuple):
    """n labelled samples, ascending by clip and frame."""

    clip: np.ndarray
    """int32 [n]"""
    frame: np.ndarray
    """int32 [n]; 0 where clips are pooled."""
    label: np.ndarray
    """int32 [n]: index into the track's names."""
    shuffled: np.ndarray
    """int32 [SHUFFLES, n]: the control's labels."""
    part: np.ndarray
    """int8 [n]: which of PARTS groups of speakers the sample's speaker is in."""
    speakers: int
    left_out: int
    """Clips that are not used: their speaker, phones or value is not known."""

    def take(self, chosen: np.ndarray) -> "Samples":
        fields = {name: getattr(self, name)[chosen] for name in ("clip", "frame", "label", "part")}
        return self._replace(shuffled=self.shuffled[:, chosen], **fields)


def open_track(store: ActivationStore, concept: str) -> Track:
    """The labels that `concept` asks for. Raises HearsaeError where the store has none such, and for a concept that can't be read."""
    kind, _, name = concept.partition(":")
    if concept == "phones" or (kind in ("phone", "class") and name):
        timings = read_timings(store)
        phones = labels_of(timings.phones, store.clips)
        if kind == "class" and name not in CLASSES:
            raise HearsaeError(f"there is no class '{name}' of phones; there are: {', '.join(CLASSES)}")
        if kind == "phone" and name not in phones.phones:
            raise HearsaeError(f"nobody says '{name}' in {store.path}; its phones are: {', '.join(phones.phones)}")
        wanted = (
            {f"phone:{phone}": {phone} for phone in phones.phones} if kind == "phones" else {concept: CLASSES[name] if kind == "class" else {name}}
        )
        concepts = {full: np.array([phone in those for phone in phones.phones]) for full, those in wanted.items()}
        return Track(phones.phones, concepts, None, None, phones)
    column, has_value, value = concept.partition("=")
    if column not in store.clips.column_names:
        raise HearsaeError(f"concept '{concept}' can't be read: use {OF_PHONES}; the columns are: {', '.join(store.clips.column_names)}")
    texts = [None if entry is None else str(entry) for entry in store.clips[column].to_pylist()]
    names = tuple(sorted({text for text in texts if text is not None}))
    if has_value and value not in names:
        some = ", ".join(name for name, _ in Counter(text for text in texts if text is not None).most_common(10))
        raise HearsaeError(f"no clip of {store.path} has {column} '{value}'; its commonest values are: {some}")
    index = {name: i for i, name in enumerate(names)}
    of_clip = np.array([UNLABELLED if text is None else index[text] for text in texts], np.int32)
    concepts = {f"{column}={name}": np.arange(len(names)) == i for i, name in enumerate(names) if not has_value or name == value}
    return Track(names, concepts, column, of_clip, None)


def choose_samples(store: ActivationStore, site: str, track: Track, n: int, pooled: bool, limit: int | None = None, seed: int = 0) -> Samples:
    """At most n labelled samples of the committed clips.

    Of a single concept half of the samples have it, where there are so many; else they are as frequent as in the store. limit: look at the first so
    many clips only; a store's clips are in random order. Reads no activations.
    Raises HearsaeError without labelled samples, without known speakers and with fewer than PARTS of them.
    """
    part_of, speakers = _parts(store, track, seed)
    has = next(iter(track.concepts.values()))
    strata = [has, ~has] if len(track.concepts) == 1 else [np.ones(len(track.names), bool)]
    found: list[list[np.ndarray]] = [[] for _ in strata]
    lowest = [np.zeros((0, 4), np.uint64) for _ in strata]
    lengths: dict[int, int] = {}
    left_out = 0
    for shard in store.committed(site):
        for span in store.spans(shard, site):
            if limit is not None and span.clip >= limit:
                continue
            length = span.stop - span.start
            label = track.frames(span.clip, 1 if pooled else length)
            frames = np.flatnonzero(label != UNLABELLED)
            if part_of[span.clip] < 0 or not len(frames):
                left_out += 1
                continue
            lengths[span.clip] = length
            order = frame_hash(seed, np.full(len(frames), span.clip), frames)
            entries = np.stack([order, np.full(len(frames), span.clip, np.uint64), frames.astype(np.uint64), label[frames].astype(np.uint64)], axis=1)
            for i, stratum in enumerate(strata):
                found[i].append(entries[stratum[label[frames]]])
        for i in range(len(strata)):
            together = np.concatenate([lowest[i], *found[i]])
            lowest[i], found[i] = together[np.argsort(together[:, 0], kind="stable")][:n], []
    if len(lowest) == 2:
        with_it, without = lowest
        lowest = [with_it[: max(n // 2, n - len(without))], without[: n - min(n // 2, len(with_it))]]
    entries = np.concatenate(lowest)
    if not len(entries):
        raise HearsaeError(f"{store.path} has no clip of {site} with a known speaker and a label of this concept")
    entries = entries[np.lexsort((entries[:, 2], entries[:, 1]))]
    clip, frame, label = (entries[:, i].astype(kind) for i, kind in ((1, np.int32), (2, np.int32), (3, np.int32)))
    part = part_of[clip]
    shuffled = _rotated(track, clip, frame, label, lengths, seed) if track.phones is not None else _dealt_anew(track, clip, part, store, seed)
    return Samples(clip, frame, label, shuffled, part, speakers, left_out)


def _speakers(store: ActivationStore) -> list[str | None]:
    return store.clips["speaker"].to_pylist() if "speaker" in store.clips.column_names else [None] * store.clips.num_rows


def _parts(store: ActivationStore, track: Track, seed: int) -> tuple[np.ndarray, int]:
    """The part of every clip, -1 where its speaker is not known, and how many speakers there are."""
    speakers = _speakers(store)
    known = len({speaker for speaker in speakers if speaker})
    if not known:
        raise HearsaeError(f"{store.path} does not say who speaks (no column 'speaker'), so no speakers can be held out")
    by_clip = track.column == "speaker"
    if known < PARTS and not by_clip:
        raise HearsaeError(f"{store.path} has {known} speakers, and {PARTS} are needed to hold some of them out")
    units = [f"clip {clip}" if by_clip else speaker for clip, speaker in enumerate(speakers)]
    labels: defaultdict[str, Counter[int]] = defaultdict(Counter)
    for clip, unit in enumerate(units):
        if unit:
            labels[unit][0 if track.of_clip is None else int(track.of_clip[clip])] += 1
    # By the label first, so that every part gets its share of those who have it.
    ordered = sorted(labels, key=lambda unit: (labels[unit].most_common(1)[0][0], hashlib.sha256(f"{seed} {unit}".encode()).digest()))
    place = {unit: i % PARTS for i, unit in enumerate(ordered)}
    return np.array([place[unit] if speakers[clip] and unit else -1 for clip, unit in enumerate(units)], np.int8), known


def _rotated(track: Track, clip: np.ndarray, frame: np.ndarray, label: np.ndarray, lengths: dict[int, int], seed: int) -> np.ndarray:
    """The control's labels of phones: the track of every clip is rotated (`analysis.phone_labels`)."""
    shuffled = np.zeros((SHUFFLES, len(clip)), np.int32)
    for one in np.unique(clip):
        own = slice(*np.searchsorted(clip, [one, one + 1]))
        whole = track.frames(int(one), lengths[int(one)])
        for i in range(SHUFFLES):
            shuffled[i, own] = np.roll(whole, rotation(seed + 1 + i, int(one), len(whole)))[frame[own]]
    return np.where(shuffled == UNLABELLED, label, shuffled)  # the ends of a clip may have no label


def _dealt_anew(track: Track, clip: np.ndarray, part: np.ndarray, store: ActivationStore, seed: int) -> np.ndarray:
    """The control's labels of a column: its values change owners, speakers or clips, within each part, so that every part has as many of each."""
    speakers = _speakers(store)
    assert track.of_clip is not None
    units = np.array([f"clip {one}" if track.column == "speaker" else str(speakers[one]) for one in clip])
    shuffled = np.zeros((SHUFFLES, len(clip)), np.int32)
    generator = np.random.default_rng(seed)
    for one in np.unique(part):
        own = part == one
        names, unit_of = np.unique(units[own], return_inverse=True)
        value = np.zeros(len(names), np.int32)
        value[unit_of] = track.of_clip[clip[own]]
        for i in range(SHUFFLES):
            shuffled[i, own] = generator.permutation(value)[unit_of]
    return shuffled


def sample_values(store: ActivationStore, features: list[Features], samples: Samples, pool: Pool, shard: int) -> list[np.ndarray]:
    """The values of some features of one site for the samples of a shard, in their order: float32 [samples of the shard, features] for each.

    Reads the site's rows once. Of pooled clips a value is the mean or the largest over the clip's frames.
    """
    clips = np.array(store.shard_clips(shard))
    first, stop = np.searchsorted(samples.clip, clips), np.searchsorted(samples.clip, clips, side="right")
    wanted = {clip: samples.frame[a:b] for clip, a, b in zip(clips.tolist(), first, stop, strict=True) if b > a}
    site = features[0].site
    values: list[list[np.ndarray]] = [[np.zeros((0, one.count), np.float32)] for one in features]
    if not wanted:
        return [part[0] for part in values]
    for block in blocks(Neurons(site, store.sites[site]["width"]), store, shard):
        assert block.dense is not None
        for i, clip in enumerate(block.clips.tolist()):
            if clip not in wanted:
                continue
            rows = block.dense[block.first_row[i] : block.first_row[i + 1]]
            for number, one in enumerate(features):
                if pool == "none":
                    values[number].append(one.dense(rows[wanted[clip]]))
                else:
                    of_frames = one.dense(rows)
                    values[number].append((of_frames.mean(0) if pool == "mean" else of_frames.max(0))[None].astype(np.float32))
    return [np.concatenate(part) for part in values]

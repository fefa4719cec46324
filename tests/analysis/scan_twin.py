"""What a scan must find, written the plain way: all values in memory, loops over features, Python's own integers."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from analysis.grid import BINS, bin_edges
from analysis.scan import ScanOptions
from cache.store import ActivationStore
from sae.models import Centre, Dictionary, SaeConfig

SITE = "encoder.blocks.0"


class Example(NamedTuple):
    value: float
    clip: int
    frame: int


class Rows(NamedTuple):
    """All rows of a site: values float32 [n, features], clip and frame of each."""

    values: np.ndarray
    clip: np.ndarray
    frame: np.ndarray


def all_rows(store: ActivationStore, site: str) -> Rows:
    parts = []
    for shard in store.committed(site):
        for span in store.spans(shard, site):
            values = store.read_clip(site, span.clip).astype(np.float32)
            parts.append((values, np.full(len(values), span.clip), np.arange(len(values))))
    return Rows(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def splitmix64(state: int) -> int:
    z = (state + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def hash_of(seed: int, clip: int, frame: int) -> int:
    return splitmix64((splitmix64((splitmix64(seed) + clip) % 2**64) + frame) % 2**64)


def bin_number(value: float) -> int:
    """By comparison with the edges; -1 for zero."""
    if value == 0:
        return -1
    edges = bin_edges()
    found = np.searchsorted(edges, value, side="right") - 1 if value > 0 else np.searchsorted(edges, value, side="left") - 1
    return int(np.clip(found, 0, BINS - 1))


def top(rows: Rows, feature: int, k: int, sign: int = 1, speaker_of: Sequence[object] | None = None, per_speaker: int = 0) -> list[Example]:
    """sign -1: the most negative. speaker_of: of every clip; of each speaker at most `per_speaker`, if that is not 0."""
    best: dict[int, Example] = {}
    for value, clip, frame in zip((sign * rows.values[:, feature]).tolist(), rows.clip.tolist(), rows.frame.tolist(), strict=True):
        if value > 0 and (clip not in best or value > best[clip].value):
            best[clip] = Example(value, clip, frame)
    found: list[Example] = []
    of_speaker: Counter[object] = Counter()
    for example in sorted(best.values(), key=lambda example: (-example.value, example.clip, example.frame)):
        speaker = speaker_of[example.clip] if speaker_of else None
        of_speaker[speaker] += 1
        if not per_speaker or of_speaker[speaker] <= per_speaker:
            found.append(example._replace(value=sign * example.value))
    return found[:k]


class Run(NamedTuple):
    frames: int
    rise: int
    fall: int


def runs(rows: Rows, feature: int) -> list[Run]:
    found, current = [], []
    ends = [*(rows.clip[1:] != rows.clip[:-1]), True]
    for value, clip_ends in zip(rows.values[:, feature].tolist(), ends, strict=True):
        if value > 0:
            current.append(value)
        if current and (value <= 0 or clip_ends):
            peak = current.index(max(current))
            found.append(Run(len(current), peak, len(current) - 1 - peak))
            current = []
    return found


class Partner(NamedTuple):
    other: int
    both: int
    jaccard: float
    lift: float


def counted_rows(rows: Rows, among: int) -> np.ndarray:
    """bool [n, features]: where a feature is among the row's strongest above zero."""
    counted = np.zeros(rows.values.shape, bool)
    for row, values in zip(counted, rows.values.tolist(), strict=True):
        active = [i for i, value in enumerate(values) if value > 0]
        row[sorted(active, key=lambda i: (-values[i], i))[:among]] = True
    return counted


def partners(counted: np.ndarray, feature: int, n: int) -> list[Partner]:
    found = []
    for other in range(counted.shape[1]):
        both = int((counted[:, feature] & counted[:, other]).sum())
        if other != feature and both:
            one, two = int(counted[:, feature].sum()), int(counted[:, other].sum())
            found.append(Partner(other, both, both / (one + two - both), both * len(counted) / (one * two)))
    return sorted(found, key=lambda partner: (-partner.jaccard, partner.other))[:n]


def draw(rows: Rows, feature: int, lo: float, hi: float, options: ScanOptions, closed: bool = False) -> list[Example]:
    """The frames of lowest hash with lo <= value < hi (or <= hi), one per clip."""
    values = rows.values[:, feature]
    inside = np.flatnonzero((values > 0) & (values >= lo) & ((values <= hi) if closed else (values < hi)))
    found = [Example(float(values[i]), int(rows.clip[i]), int(rows.frame[i])) for i in inside]
    taken: dict[int, Example] = {}
    for example in sorted(found, key=lambda example: hash_of(options.seed, example.clip, example.frame)):
        taken.setdefault(example.clip, example)
    return list(taken.values())[: options.per_bin]


def save_sae(folder: Path, d_in: int = 16, d_sae: int = 48, site: str = SITE, model_sha256: str = "0" * 64) -> Path:
    """A random dictionary for rows with means 0, 1, 2, ..., and a threshold that few values pass."""
    dictionary = Dictionary(SaeConfig("batchtopk", d_in, d_sae, k=4, site=site, model_sha256=model_sha256))
    dictionary.init_parameters(torch.Generator().manual_seed(0))
    dictionary.threshold.fill_(1.0)
    dictionary.folded(Centre.of(np.arange(d_in, dtype=np.float64), 1.0)).save(folder)
    return folder

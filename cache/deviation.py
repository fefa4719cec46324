"""How far the activations of trimmed windows are from those of whole ones: measured on a few clips while they are captured, kept in the commit
records of their shards."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

COMPARED_CLIPS = 8
"""Of a plan, at even distances: enough to see a tenth of a difference, and seconds of work."""


class Deviation(NamedTuple):
    """Of a site, over all frames of the clips that were compared."""

    relative: float
    """||trimmed - padded|| / ||padded||"""
    cosine: float
    """Mean, over frames, of the cosine of the two."""
    clips: int


class DeviationSums(NamedTuple):
    """The same as sums, which add up."""

    clips: int = 0
    rows: int = 0
    sq_difference: float = 0.0
    sq_padded: float = 0.0
    cosine: float = 0.0

    def plus(self, other: "DeviationSums") -> "DeviationSums":
        together = (one + two for one, two in zip(self, other, strict=True))
        return DeviationSums._make(together)

    def deviation(self) -> Deviation | None:
        """None where nothing was compared."""
        if not self.rows:
            return None
        return Deviation((self.sq_difference / self.sq_padded) ** 0.5 if self.sq_padded else 0.0, self.cosine / self.rows, self.clips)


def compare(trimmed: np.ndarray, padded: np.ndarray) -> DeviationSums:
    """Of one clip: [n_frames, d] each. The cosine with a row of zeros is 0."""
    ours, theirs = trimmed.astype(np.float64), padded.astype(np.float64)
    norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    cosines = np.divide((ours * theirs).sum(axis=1), norms, out=np.zeros(len(ours)), where=norms > 0)
    return DeviationSums(1, len(ours), float(np.square(ours - theirs).sum()), float(np.square(theirs).sum()), float(cosines.sum()))


def clips_to_compare(n_clips: int, among: range) -> list[int]:
    """Those of `among` that lie at even distances in a plan of so many clips."""
    count = min(COMPARED_CLIPS, n_clips)
    return [clip for clip in ((2 * i + 1) * n_clips // (2 * count) for i in range(count)) if clip in among]


def take_due(due: list[int], readable: Iterable[int]) -> list[int]:
    """The clips that stand for those of `due` that have come: each itself or, where it can't be read, the next one that can.

    readable: clips in ascending order. Takes away from `due` (ascending) what it found.
    """
    taken = []
    for clip in readable:
        if due and due[0] <= clip:
            due.pop(0)
            taken.append(clip)
    return taken

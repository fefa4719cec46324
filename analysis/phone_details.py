"""Second pass of phone evidence: now that each feature's phone and threshold are known, what needs them, by jackknife group.

All of it is integers in arrays of fixed size: merging is addition.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from analysis.blocks import Block, blocks
from analysis.features import Features
from analysis.phone_kernels import LATENCIES, RANGES, count_labels, detail_dense, detail_sparse
from analysis.phone_labels import GROUPS, PhoneLabels
from cache.store import ActivationStore


class Targets(NamedTuple):
    """What the second pass looks for in each feature; of `analysis.phone_scores.targets`."""

    phone: np.ndarray
    """int16 [features]: index into the phones; -1 for a feature that is not looked at."""
    class_of: np.ndarray
    """int16 [features]: row of `members`."""
    members: np.ndarray
    """bool [classes + 1, phones]; the last row has none."""
    threshold: np.ndarray
    """float32 [features]: at and above it the feature detects; inf for one that never does."""
    high: np.ndarray
    """float32 [features]: largest value."""
    top_from: np.ndarray
    """float64 [features]: where the top of its activations begins; inf where it has too few."""
    lower_from: np.ndarray
    """float64 [features]: where the activations begin that are compared with the top."""
    first_bin: np.ndarray
    """int64 [features]: lowest bin with a count."""
    n_bins: np.ndarray
    """int64 [features]: so many bins from there on."""

    @property
    def offset(self) -> np.ndarray:
        """int64 [features + 1]: where each feature's histograms, [GROUPS, 3, n_bins], lie among all."""
        return np.concatenate([[0], np.cumsum(GROUPS * 3 * self.n_bins)])


class PhoneDetails(NamedTuple):
    """What some rows say. Travels between processes. int32 holds 40,000 hours of frames in one bin."""

    frames: np.ndarray
    """int64 [GROUPS, phones]"""
    near_frames: np.ndarray
    """int64 [GROUPS, phones, phones]: row q is `frames` with those within a frame of phone q counted as q's."""
    histogram: np.ndarray
    """int32 [targets.offset[-1]]: frames of all phones, of the feature's phone, of its class, by bin."""
    detected: np.ndarray
    """int32 [features, GROUPS, 4]: see `analysis.phone_kernels.DETECTED`."""
    latency: np.ndarray
    """int32 [features, GROUPS, LATENCIES]: of the phone's occurrences, by when the first frame detects."""
    ranges: np.ndarray
    """int32 [features, RANGES, phones]"""
    strata: np.ndarray
    """int32 [features, GROUPS, 2, phones]: frames of the top and of the lower activations; those within a frame of its phone count as its."""


def no_details(targets: Targets) -> PhoneDetails:
    """The details of no rows."""
    features, phones = len(targets.phone), targets.members.shape[1]
    return PhoneDetails(
        np.zeros((GROUPS, phones), np.int64),
        np.zeros((GROUPS, phones, phones), np.int64),
        np.zeros(targets.offset[-1], np.int32),
        np.zeros((features, GROUPS, 4), np.int32),
        np.zeros((features, GROUPS, LATENCIES), np.int32),
        np.zeros((features, RANGES, phones), np.int32),
        np.zeros((features, GROUPS, 2, phones), np.int32),
    )


def detail_block(block: Block, labels: PhoneLabels, targets: Targets, details: PhoneDetails) -> None:
    """Adds a block's rows."""
    if not len(block.clip_of_row):
        return
    said = labels.of(block)
    count_labels(block.first_row, said.label, said.group, details.frames, details.near_frames)
    where = (block.first_row, said.label, said.group, said.occurrence, said.occurrence_clip, said.occurrence_us)
    sought = (
        targets.phone, targets.class_of, targets.members, targets.threshold, targets.high, targets.top_from, targets.lower_from,
        targets.first_bin, targets.n_bins, targets.offset,
    )  # fmt: skip
    into = details[2:]
    if block.dense is not None:
        detail_dense(block.dense, *where, *sought, *into)
    else:
        detail_sparse(block.start, block.latent, block.value, *where, *sought, *into)


def detail_shard(features: Features, store: ActivationStore, labels: PhoneLabels, targets: Targets, shard: int) -> PhoneDetails:
    """One committed shard. Depends on nothing but its arguments."""
    details = no_details(targets)
    for block in blocks(features, store, shard):
        detail_block(block, labels, targets, details)
    return details


def merge_details(a: PhoneDetails, b: PhoneDetails) -> PhoneDetails:
    """The details of the rows of both, of which they share none."""
    return PhoneDetails(*(x + y for x, y in zip(a, b, strict=True)))


def histograms(details: PhoneDetails, targets: Targets) -> Iterator[np.ndarray]:
    """int64 [GROUPS, 3, n_bins] of one feature after another; zeros are in none."""
    offset = targets.offset
    for feature, n_bins in enumerate(targets.n_bins):
        yield details.histogram[offset[feature] : offset[feature + 1]].reshape(GROUPS, 3, n_bins).astype(np.int64)

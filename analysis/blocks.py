"""The rows of a shard, some thousand at a time, with every feature's values: what everything that looks at all rows loops over."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from analysis.features import Features
from cache.errors import HearsaeError
from cache.store import ActivationStore, Span

BLOCK_ROWS = 8192
"""Rows looked at together, whole clips: enough to make a block's fixed costs small, few enough for a laptop's memory."""


class Block(NamedTuple):
    """The n rows of c whole clips of one shard, in address order, and the features' values: either `dense`, or the nonzero ones alone."""

    clips: np.ndarray
    """int32 [c]"""
    first_row: np.ndarray
    """int64 [c + 1]: clip i has the rows `first_row[i]:first_row[i + 1]`."""
    clip_of_row: np.ndarray
    """int32 [n]"""
    frame_of_row: np.ndarray
    """int32 [n]: the frame (or token) within the clip."""
    dense: np.ndarray | None
    """float32 [n, features], or None."""
    start: np.ndarray
    """int64 [n + 1]: the entries of row i are `start[i]:start[i + 1]` of `latent` and `value`; empty where `dense` is given."""
    latent: np.ndarray
    """int32: the feature of each entry."""
    value: np.ndarray
    """float32: its value, not zero."""


def blocks(features: Features, store: ActivationStore, shard: int) -> Iterator[Block]:
    """The rows of a committed shard. Depends on nothing but its arguments.

    Raises HearsaeError for a value that is not finite, StoreError for rows that can't be read.
    """
    for spans in _whole_clips(store.spans(shard, features.site)):
        lengths = np.array([span.stop - span.start for span in spans])
        first_row = np.concatenate([[0], np.cumsum(lengths)])
        clips = np.array([span.clip for span in spans], np.int32)
        clip_of_row = np.repeat(clips, lengths)
        frame_of_row = (np.arange(first_row[-1]) - np.repeat(first_row[:-1], lengths)).astype(np.int32)
        rows = _read_rows(store, features.site, shard, spans, clip_of_row, frame_of_row)
        codes = features.sparse(rows)
        if codes is None:
            nothing = np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32)
            yield Block(clips, first_row, clip_of_row, frame_of_row, features.dense(rows), *nothing)
        else:
            start = np.searchsorted(codes.row, np.arange(len(rows) + 1))
            yield Block(clips, first_row, clip_of_row, frame_of_row, None, start, codes.latent, codes.value)


def _whole_clips(spans: Iterable[Span]) -> Iterator[list[Span]]:
    """Whole clips that lie within BLOCK_ROWS of each other; a longer clip is a block of its own."""
    block: list[Span] = []
    for span in spans:
        if block and span.stop - block[0].start > BLOCK_ROWS:
            yield block
            block = []
        block.append(span)
    if block:
        yield block


def _read_rows(store: ActivationStore, site: str, shard: int, spans: list[Span], clip_of_row: np.ndarray, frame_of_row: np.ndarray) -> np.ndarray:
    rows = store.read(site, spans[0].start, spans[-1].stop)
    if len(rows) > len(clip_of_row):  # skipped clips lie between
        rows = rows[np.concatenate([np.arange(span.start, span.stop) for span in spans]) - spans[0].start]
    finite = np.isfinite(rows).all(axis=1)
    if not finite.all():
        bad = int(np.argmin(finite))
        raise HearsaeError(
            f"{site} in {store.path} has a value that is not finite in shard {shard}, clip {clip_of_row[bad]}, row {frame_of_row[bad]}: "
            "cache that site into a new store with --dtype float32, which does not overflow"
        )
    return rows

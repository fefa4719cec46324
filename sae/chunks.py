"""Chunks, the units of reading a store: which have rows, and the rows that they have."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from cache.errors import HearsaeError
from cache.store import ActivationStore, Span
from sae.kernels import has_not_finite

NOT_FINITE = {"float16": np.uint16(0x7C00), "float32": np.uint32(0x7F800000)}
"""The bits of the exponent: all are set in what is NaN or infinite, and in nothing else."""


class Chunk(NamedTuple):
    """One unit of reading that has rows."""

    store: int
    shard: int
    start: int
    """First row, counted over the whole array."""
    stop: int
    rows: int
    """Valid ones; of a planned chunk those that it has if no clip is skipped."""


def valid_chunks(store: ActivationStore, sites: Sequence[str], shard: int, number: int = 0) -> Iterator[Chunk]:
    """The chunks of a committed shard that have valid rows, in address order. number: what they shall call the store."""
    return _chunks_of(store, sites[0], shard, store.spans(shard, *sites), number)


def planned_chunks(store: ActivationStore, sites: Sequence[str], shard: int, number: int = 0) -> Iterator[Chunk]:
    """The chunks in which the plan puts rows, whether the shard is committed or not, in address order."""
    axis = store.sites[sites[0]]["axis"]
    spans = [store.planned_span(axis, clip) for clip in store.shard_clips(shard)]
    return _chunks_of(store, sites[0], shard, [span for span in spans if span.stop > span.start], number)


def _chunks_of(store: ActivationStore, site: str, shard: int, spans: Sequence[Span], number: int) -> Iterator[Chunk]:
    axis = store.axis(site)
    first = shard * axis.shard_rows
    valid = np.zeros(axis.shard_rows // axis.chunk_rows, dtype=np.int64)
    for span in spans:
        for i in range((span.start - first) // axis.chunk_rows, (span.stop - 1 - first) // axis.chunk_rows + 1):
            start = first + i * axis.chunk_rows
            valid[i] += min(span.stop, start + axis.chunk_rows) - max(span.start, start)
    for i in np.flatnonzero(valid).tolist():
        start = first + i * axis.chunk_rows
        yield Chunk(number, shard, start, start + axis.chunk_rows, int(valid[i]))


def rows_within(chunk: Chunk, spans: Sequence[Span]) -> int:
    """How many rows of a chunk lie in one of the spans."""
    return sum(max(0, min(span.stop, chunk.stop) - max(span.start, chunk.start)) for span in spans)


def read_valid(store: ActivationStore, site: str, chunk: Chunk, spans: Sequence[Span], advice: str = "cache that shard again") -> np.ndarray:
    """The rows of a chunk that lie in one of the spans, [rows, d], as stored. Raises HearsaeError, with `advice`, if a value is NaN or infinite."""
    rows = read_rows(store, site, chunk, spans)
    refuse_not_finite(rows, store, site, chunk, spans, advice)
    return rows


def refuse_not_finite(rows: np.ndarray, store: ActivationStore, site: str, chunk: Chunk, spans: Sequence[Span], advice: str) -> None:
    """Raises HearsaeError, with `advice`, if a value of a chunk's rows is NaN or infinite."""
    bad = not_finite(rows)
    if bad.any():
        number = row_numbers(chunk, spans)[bad]
        raise HearsaeError(f"{store.path}: {site} has NaN or infinite values in shard {chunk.shard}, first in row {number[0]}: {advice}")


def read_rows(store: ActivationStore, site: str, chunk: Chunk, spans: Sequence[Span]) -> np.ndarray:
    """The rows of a chunk that lie in one of the spans, [rows, d], as stored, whatever the values."""
    rows = np.empty((chunk.rows, store.sites[site]["width"]), store.header.dtype)
    read_rows_into(rows, store, site, chunk, spans)
    return rows


def read_rows_into(out: np.ndarray, store: ActivationStore, site: str, chunk: Chunk, spans: Sequence[Span]) -> None:
    """The same into out [rows, d], which has no gaps."""
    if chunk.rows == chunk.stop - chunk.start:
        store.read_into(site, chunk.start, out)
    else:
        np.take(store.read(site, chunk.start, chunk.stop), row_numbers(chunk, spans) - chunk.start, axis=0, out=out)


def row_numbers(chunk: Chunk, spans: Sequence[Span]) -> np.ndarray:
    """int64 [rows]: those of a chunk that lie in one of the spans, counted over the whole array."""
    valid = np.zeros(chunk.stop - chunk.start, dtype=bool)
    for span in spans:
        valid[max(span.start - chunk.start, 0) : max(span.stop - chunk.start, 0)] = True
    return chunk.start + np.flatnonzero(valid)


def not_finite(rows: np.ndarray) -> np.ndarray:
    """bool [rows]: which have a NaN or an infinite value."""
    if not has_not_finite(rows.view(f"u{rows.itemsize}"), NOT_FINITE[rows.dtype.name]):
        return np.zeros(len(rows), dtype=bool)
    return ~np.isfinite(rows).all(axis=1)
